"""An exported student timed again on its device: promise and measurement."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from proard.artifacts import read_header, write_json, write_text
from proard.config import Space, UserError
from proard.config.budgets import parse_budget
from proard.latency.bench import TIME, measure
from proard.latency.fit import read_bench
from proard.latency.kinds import Kind, kind_of_file
from proard.space import SearchSpace, read_device

WEIGHTS, RECORD, CARD, CHECKSUMS = "student.safetensors", "latency.json", "card.md", "SHA256SUMS"
HEADING = "## Latency, promised and measured"


def check(
    folder: str | Path, *, device: str | Path | None = None, measured: str | Path | None = None, seconds: float = 0.2
) -> dict[str, Any]:
    """Measure an exported student again; write `latency.json` and a section of its card.

    Parameters
    ----------
    folder : str or Path
        Of `export_student`.
    device : str or Path, optional
        The device's latency table; by default the one that the student was selected with. A table of int8 files or of
        ExecuTorch is checked with that file of the student, where its stage wrote it or in the folder.
    measured : str or Path, optional
        What `bench.py student.onnx` wrote on the device; by default the student is timed on this machine.
    seconds : float
        Of each of the visits here.

    Returns
    -------
    dict
        Contents of `latency.json`: `promised_ms`, `measured_ms` (tenth percentile of the calls, as in the table),
        `median_ms` and `p90_ms` beside it, `error` of the promise relative to the measurement,
        the noise (the larger of the two passes' difference here and when the table was made: two passes of a second
        do not see a slow drift of the machine), whether the budget is met, and whether the machine is the table's.

    Raises
    ------
    UserError
        There is no such student or file, no device is known, ExecuTorch is needed and missing, or the measurement is of
        another file or number of threads.
    """
    header = read_header(Path(folder) / WEIGHTS)
    device = device or header.get("device")
    if device is None:
        raise UserError(f"the student in {folder} was selected without a device; name its table with --device")
    table = read_device(device)
    assert table is not None
    if header.get("space", {}).get("units") is None:
        raise UserError(f"{folder} holds no subnet of a space; a latency table predicts those alone")
    space = SearchSpace(Space.model_validate(header["space"]), table)
    genotype = space.genotype(space.read_arch(header["arch"]))
    promised = float(space.costs(np.asarray([genotype]))["latency"][0])
    threads = int(table.facts.get("threads", 1))
    kind = kind_of_file(table.file)
    path, name = _timed_file(Path(folder), kind), kind.file
    if not measured and kind.runtime == "executorch":
        from proard.export.executorch import require_executorch  # with torch

        require_executorch("proard latency check with a table of ExecuTorch")
    found = read_bench(Path(measured)) if measured else measure({name: path}, threads=threads, seconds=seconds)
    if set(found["files"]) != {name} or found["threads"] != threads:
        raise UserError(f"{measured} is not of {name} on {threads} threads: python bench.py {name} --threads {threads}")
    times = found["files"][name]
    limit = parse_budget(header["budget"]).limits.get("latency") if "=" in header.get("budget", "") else None
    same = all(found["device"][key] == table.facts["machine"][key] for key in ("processor", "machine"))
    record = {
        "device": table.device,
        "precision": table.precision,
        "file": name,
        "is_the_device": same and found["runtime"] == table.facts["runtime"],
        "processor": found["device"]["processor"],
        "runtime": found["runtime"],
        "threads": threads,
        "promised_ms": promised,
        "measured_ms": times[TIME],
        "median_ms": times["median_ms"],
        "p90_ms": times["p90_ms"],
        "runs": times["runs"],
        "error": promised / times[TIME] - 1,
        "noise": max(found["noise"]["mean"], table.facts.get("noise", {}).get("mean", 0.0)),
        "budget_ms": limit,
        "met": None if limit is None else times[TIME] <= limit,
        "before": found["before"],
        "after": found["after"],
    }
    write_json(Path(folder) / RECORD, record)
    _write_card(Path(folder), record)
    return record


def _timed_file(folder: Path, kind: Kind) -> Path:
    """The student's file of a kind.

    Raises
    ------
    UserError
        There is none.
    """
    places = [folder / kind.file]
    if kind.stage != "export_student":
        places.insert(0, folder.parent.parent / kind.stage / folder.name / kind.file)
    for path in places:
        if path.exists():
            return path
    raise UserError(
        f"the table is of {kind.file}, and there is no {places[0]}; run {kind.stage} or copy it to {folder}"
    )


def _write_card(folder: Path, record: dict[str, Any]) -> None:
    """Put the section into the card, in the place of an earlier one, and keep the list of checksums true."""
    card = folder / CARD
    if card.exists():
        text = card.read_text(encoding="utf-8")
        before = re.sub(rf"\n{re.escape(HEADING)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
        write_text(card, f"{before.rstrip()}\n\n{section(record)}")
    sums = folder / CHECKSUMS
    if sums.exists():
        lines = [
            line for line in sums.read_text(encoding="utf-8").splitlines() if line.split()[-1] not in (CARD, RECORD)
        ]
        names = [name for name in (CARD, RECORD) if (folder / name).exists()]
        lines += [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
        write_text(sums, "".join(f"{line}\n" for line in lines))


def section(record: dict[str, Any]) -> str:
    """The section of the card."""
    budget = ""
    if record["budget_ms"] is not None:
        budget = f"| Budget | {record['budget_ms']:.4g} ms, {'met' if record['met'] else 'NOT met'} |\n"
    other = "" if record["is_the_device"] else " (another processor or runtime than that of the table)"
    return (
        f"{HEADING}\n\n| | |\n|---|---|\n"
        f"| Promised for {record['device']}, {record['precision']} | {record['promised_ms']:.4g} ms, "
        f"`{record['file']}` |\n"
        f"| Measured on {record['processor']}{other} | {record['measured_ms']:.4g} ms, the tenth percentile of "
        f"{record['runs']:,} calls; median {record['median_ms']:.4g}, ninetieth {record['p90_ms']:.4g} |\n"
        f"| Promise less measurement | {record['error']:+.1%}; noise {record['noise']:.1%} |\n"
        f"{budget}"
        f"| Runtime, threads | {record['runtime']}, {record['threads']} |\n"
    )
