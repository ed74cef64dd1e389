"""Time the ONNX files of this folder on this device; needs numpy and onnxruntime alone.

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
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

FORMAT = "proard latency bench 1"
PASSES = 2
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
    parser.add_argument("file", nargs="?", help="an ONNX file; without it all files of the manifest")
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
        ONNX files with one input of shape (batch, channels, height, width).
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
    device = describe(name)
    before, order, rng = state(), list(files), random.Random(0)
    times: dict[str, list[list[float]]] = {file: [[] for _ in range(PASSES)] for file in files}
    for number in range(PASSES):
        for turn in range(rounds):
            rng.shuffle(order)
            for file in order:
                times[file][number] += visit(files[file], threads=threads, seconds=seconds)
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
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU",
        "threads": threads,
        "batch_size": 1,
        "rounds": rounds,
        "seconds": seconds,
        "before": before,
        "after": state(),
        "noise": {"mean": float(np.mean(spread)), "p90": float(np.percentile(spread, 90))},
        "files": found,
    }


def visit(path: Path, *, threads: int, seconds: float) -> list[float]:
    """Milliseconds of single calls of a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    shape = [1, *entry.shape[1:]]
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    feed = {entry.name: (255 * values).astype(np.uint8) if entry.type == "tensor(uint8)" else values}
    names = [output.name for output in session.get_outputs()]
    for _ in range(2):
        session.run(names, feed)
    times: list[float] = []
    clock, started = time.perf_counter, time.perf_counter()
    while len(times) < FEWEST_RUNS or clock() - started < seconds:
        begun = clock()
        session.run(names, feed)
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
