"""C kernels for CPUs, compiled at first use with the machine's compiler and stored in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent  # of the sources
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
NATIVE = ("-march=native", "-mcpu=native", "-O3")  # the last two for Arm compilers without -march=native
LIMITED = {"avx2": "x86-64-v3", "default": "x86-64"}  # processor for each value of torch's limit, ATEN_CPU_CAPABILITY


@cache
def maps_library() -> ctypes.CDLL | None:
    """The compiled `maps.c`; None, with one warning, if it cannot be compiled or loaded."""
    library = loaded("maps.c", without="training")
    if library is None:
        return None
    pointer, number, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
    library.norm_forward.argtypes = [number] * 2 + [pointer] * 3 + [real] + [size] * 2 + [pointer] * 3 + [number]
    library.norm_backward.argtypes = (
        [number] * 2 + [pointer] * 4 + [real] + [pointer] * 2 + [size] * 2 + [pointer] * 3 + [number]
    )
    library.mask_gradient.argtypes = [number] + [pointer] * 3 + [size, number]
    library.mask_gradient.restype = None
    library.depthwise_filter_gradient.argtypes = (
        [number] + [pointer] * 2 + [size] * 6 + [number] * 2 + [pointer, number]
    )
    return library


@cache
def winograd_library() -> ctypes.CDLL | None:
    """The compiled `winograd.c`; None if it, or `maps.c` before it, cannot be compiled or loaded."""
    library = None if maps_library() is None else loaded("winograd.c", without="attacks")
    if library is None:
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.winograd_filters.argtypes = [pointer] + [size] * 6 + [pointer]
    library.winograd_filters.restype = None
    library.winograd_convolve.argtypes = [pointer] * 6 + [size] * 5 + [number] * 2
    return library


def loaded(name: str, *, without: str) -> ctypes.CDLL | None:
    """A compiled source of this folder; None, with a warning, if that fails: what goes `without` it is slower."""
    try:
        return ctypes.CDLL(str(build(FOLDER / name)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"the C kernels are not used, which makes {without} slower: {reason}", stacklevel=3)
        return None


def loaded_maps() -> ctypes.CDLL:
    """The compiled `maps.c`, for callers that have checked that it exists."""
    library = maps_library()
    assert library is not None
    return library


def build(source: Path) -> Path:
    """Compile a source file, unless the library for this text, compiler and processor exists; return its path.

    Raises
    ------
    OSError
        There is no C compiler, or the cache folder cannot be written.
    CalledProcessError
        The compiler fails; its messages are in `stderr`.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("no C compiler is on the path (cc, or the one in CC)")
    limit = LIMITED.get(os.environ.get("ATEN_CPU_CAPABILITY", ""))
    natives = NATIVE if limit is None else (f"-march={limit}",)
    text = source.read_bytes()
    mark = hashlib.sha256(b"\0".join([text, compiler.encode(), *map(str.encode, (*natives, *FLAGS)), processor()]))
    folder = cache_folder()
    library = folder / f"{source.stem}-{mark.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several jobs may compile at once: the last rename wins
        made = Path(scratch) / library.name
        for native in natives:
            command = [compiler, native, *FLAGS, str(source), "-o", str(made), "-lm"]
            done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", errors="replace")
            if not done.returncode:
                break
        done.check_returncode()
        os.replace(made, library)
    return library


def cache_folder() -> Path:
    """The user's cache folder; without a home folder, a private folder among the system's temporary files."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proard"
    except RuntimeError:  # no HOME, and no password entry of the user
        return private_folder(Path(tempfile.gettempdir()))


def private_folder(place: Path) -> Path:
    """A private folder of this user in a place where other users also write.

    Raises
    ------
    OSError
        The folder of that name belongs to another user, or others may write there.
    """
    folder = place / f"proard-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is not private to this user; set XDG_CACHE_HOME") from None
    return folder


def processor() -> bytes:
    """Description of the processor: its code may not run on another machine that shares the home folder."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return f"{platform.machine()} {platform.processor()}".encode()
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    kept = ("vendor_id", "cpu family", "model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first.splitlines() if line.startswith(kept)).encode()
