"""Time the files of this folder on this device; needs numpy and their runtime alone.

Files that end in .onnx are timed by onnxruntime, those that end in .pte by executorch (with torch, which it imports).

python bench.py                  all files of manifest.json -> bench.json
python bench.py student.onnx     one file -> student.bench.json

Copied from the package proard by `proard latency plan`; `proard latency fit FOLDER` reads what it writes.
"""

import argparse
import glob
import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "proard latency bench 1"
PASSES = 2
INT8 = 1  # in ExecuTorch's numbers of types
FEWEST_RUNS = 3
TIME = "p10_ms"  # of a file: the tenth percentile of its calls, because other work on the device only ever adds time
CPU_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a file to time; without it all files of the manifest")
    parser.add_argument("--name", help="name of the device (default: its processor's)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="visits of every file in each pass (default 5)")
    parser.add_argument("--seconds", type=float, default=0.05, help="timed at every visit of a file (default 0.05)")
    parser.add_argument("--out", help="the JSON file to write")
    asked = parser.parse_args(argv)
    here = Path(__file__).resolve().parent
    options: dict[str, Any] = {"threads": asked.threads, "rounds": asked.rounds, "seconds": asked.seconds}
    if asked.file:
        path = Path(asked.file)
        if path.suffix not in BY_SUFFIX:
            parser.error(f"{path} is no file that is timed; expected: {' or '.join(BY_SUFFIX)}")
        result = measure({path.name: path}, name=asked.name, **options)
        out = Path(asked.out or path.with_suffix(".bench.json"))
    else:
        manifest = here / "manifest.json"
        files = {name: here / name for name in json.loads(manifest.read_text(encoding="utf-8"))["files"]}
        result = measure(files, name=asked.name, **options)
        result["manifest_sha256"] = checksum(manifest)
        out = Path(asked.out or here / "bench.json")
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(result['files'])} files on {result['device']['name']}, {asked.threads} threads -> {out}")
    print(f"the same file in the other pass differs by {result['noise']['mean']:.1%} on average")


def measure(
    files: dict[str, Path], *, name: str | None = None, threads: int = 1, rounds: int = 5, seconds: float = 0.05
) -> dict[str, Any]:
    """Time one image through every file, in two passes of several rounds, each in another random order.

    Parameters
    ----------
    files : dict of str to Path
        Files of one runtime with one input of shape (batch, channels, height, width).
    name : str, optional
        Of the device.
    threads : int
        CPU threads.
    rounds : int
        Visits of every file in each pass: a disturbance of some seconds then touches all files alike.
    seconds : float
        Time of a visit, after two calls that are not timed; at least three calls.

    Returns
    -------
    dict
        By file and pass and over both: median, p10 and p90 in milliseconds, number of calls; what the device is; the
        relative difference between the two passes' tenth percentiles.
    """
    device, (suffix,) = describe(name), {path.suffix for path in files.values()}
    runtime = BY_SUFFIX[suffix](threads)
    before, order, rng = state(), list(files), random.Random(0)
    times: dict[str, list[list[float]]] = {file: [[] for _ in range(PASSES)] for file in files}
    for number in range(PASSES):
        for turn in range(rounds):
            rng.shuffle(order)
            for file in order:
                times[file][number] += visit(runtime, files[file], seconds=seconds)
            if len(files) > 1:
                print(f"pass {number + 1} of {PASSES}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    found: dict[str, dict[str, Any]] = {}
    for file, of_passes in times.items():
        parts = [summary(each) for each in of_passes]
        found[file] = {**summary([one for each in of_passes for one in each]), "passes": parts}
    pairs = [[each[TIME] for each in entry["passes"]] for entry in found.values()]
    spread = [2 * abs(first - second) / (first + second) for first, second in pairs]
    return {
        "format": FORMAT,
        "device": device,
        "runtime": runtime.name,
        "threads": threads,
        "batch_size": 1,
        "rounds": rounds,
        "seconds": seconds,
        "before": before,
        "after": state(),
        "noise": {"mean": float(np.mean(spread)), "p90": float(np.percentile(spread, 90))},
        "files": found,
    }


class OnnxRuntime:
    """onnxruntime on the CPU."""

    def __init__(self, threads: int) -> None:
        import onnxruntime

        self.module, self.threads = onnxruntime, threads
        self.name = f"onnxruntime {onnxruntime.__version__}, CPU"

    def load(self, path: Path) -> Callable[[], Any]:
        """One call of a file, with a random input."""
        options = self.module.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        session = self.module.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        values = random_input([1, *entry.shape[1:]], np.uint8 if entry.type == "tensor(uint8)" else np.float32)
        feed, names = {entry.name: values}, [output.name for output in session.get_outputs()]
        return lambda: session.run(names, feed)


class ExecuTorch:
    """ExecuTorch with XNNPACK."""

    def __init__(self, threads: int) -> None:
        import torch
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        _unsafe_reset_threadpool(threads)
        self.runtime, self.torch = Runtime.get(), torch
        self.name = f"executorch {version('executorch')}, XNNPACK"

    def load(self, path: Path) -> Callable[[], Any]:
        """One call of a file, with a random input."""
        program = self.runtime.load_program(path)
        method = program.load_method("forward")
        entry = method.metadata.input_tensor_meta(0)
        values = random_input(entry.sizes(), np.int8 if entry.dtype() == INT8 else np.float32)
        feed = [self.torch.from_numpy(values)]
        return partial(run_method, program, method, feed)


def run_method(program: Any, method: Any, feed: list[Any]) -> Any:
    """One call of a method; its program must exist as long as it does."""
    return method.execute(feed)


BY_SUFFIX: dict[str, type[OnnxRuntime | ExecuTorch]] = {".onnx": OnnxRuntime, ".pte": ExecuTorch}


def random_input(shape: Sequence[int], dtype: type) -> Any:
    """Numbers in [0, 1], or integers in their range."""
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    if dtype is np.float32:
        return values
    return (255 * values + np.iinfo(dtype).min).astype(dtype)


def visit(runtime: OnnxRuntime | ExecuTorch, path: Path, *, seconds: float) -> list[float]:
    """Milliseconds of single calls of a file."""
    call = runtime.load(path)
    for _ in range(2):
        call()
    times: list[float] = []
    clock, started = time.perf_counter, time.perf_counter()
    while len(times) < FEWEST_RUNS or clock() - started < seconds:
        begun = clock()
        call()
        times.append(1e3 * (clock() - begun))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and the tenth and ninetieth percentile, in milliseconds."""
    low, middle, high = np.percentile(times, [10, 50, 90])
    return {"median_ms": float(middle), "p10_ms": float(low), "p90_ms": float(high), "runs": len(times)}


def describe(name: str | None) -> dict[str, Any]:
    """What the device is."""
    fields: dict[str, str] = {}
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    board = read("/proc/device-tree/model").strip("\0\n ")
    processor = board or fields.get("model name", "") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return {
        "name": name or processor,
        "processor": processor,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def state() -> dict[str, Any]:
    """What changes while the device works: frequency governor, highest temperature in Celsius, load; or None."""
    heat = [read(path).strip() for path in sorted(glob.glob("/sys/class/thermal/thermal_zone*/temp"))]
    celsius = [int(text) / 1000 for text in heat if text.lstrip("-").isdigit()]
    governors = {read(path).strip() for path in glob.glob("/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    return {
        "governor": ", ".join(sorted(governors - {""})) or None,
        "temperature": max(celsius) if celsius else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read(path: str) -> str:
    """A small system file; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
