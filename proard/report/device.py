"""The page's section on the files that a device runs: size, time, memory and accuracy of each, by student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from proard.report.context import Context, Section, section
from proard.report.facts import Student
from proard.report.figures import PERCENT
from proard.report.inputs import Results
from proard.report.svg import COLOURS, STYLE
from proard.report.text import percent

FLOAT = "student.onnx"
ALIKE = "union"  # the row of all attacks by which float32 and int8 are compared
COLOUR = {"float32": COLOURS["blue"], "int8": COLOURS["orange"]}
ONNX, OTHER = "o", "^"  # markers of ONNX files and of those of other runtimes
MEASURED = ("clean_acc", "robust_acc")


@dataclass(frozen=True)
class DeviceFile:
    """One file of a student. `row` holds what is known of it, by the column names of the tables."""

    budget: str
    macs: float
    row: Mapping[str, Any]

    def known(self, name: str) -> Any:
        """A value; None where the tables have none."""
        value = self.row.get(name)
        return None if value is None or pd.isna(value) else value

    @property
    def label(self) -> str:
        """The kind of file in legends: its precision, with its suffix where that is not ONNX."""
        suffix = Path(str(self.row["file"])).suffix
        return str(self.row["precision"]) + ("" if suffix == ".onnx" else f", {suffix}")


def device(context: Context) -> Section | None:
    """A row per file of each student, and robust accuracy over measured time."""
    files = device_files(context.results, context.students)
    if not any(file.known("latency_ms") or file.known("bytes") for file in files):
        return None
    table = context.results.settings.get("device")
    own = context.results.settings.get("quantize_student", {}).get("attacks", ())
    by_student: dict[str, list[DeviceFile]] = {}
    for file in files:
        by_student.setdefault(file.budget, []).append(file)
    return section(
        "device",
        "On the device",
        "On the device",
        context=context,
        by_student=by_student,
        predicted=any(file.known("latency") is not None for file in files),
        predicted_for=Path(table).stem if table else None,
        predicted_files=_said([file for file in files if file.known("latency") is not None], ("file",)),
        machines=_said(files, ("runtime", "cpu", "cpu_flags")),
        paired=any(file.known("difference") is not None for file in files),
        alike=any(file.known("attack") == ALIKE for file in files),
        other_attacks=[attack["name"] for attack in own],
        images=sorted({int(file.row["num_images"]) for file in files if file.known("num_images")}),
    )


def device_files(results: Results, students: Sequence[Student]) -> list[DeviceFile]:
    """The files of every student, cheapest student first: float32, int8, then those of other runtimes.

    float32 and int8 are those of `quantize_student`; without its table, float32 is the exported file as selection and
    export measured it.
    """
    of_int8 = {str(frame["budget"].iloc[0]): frame for frame in results.quantised}
    of_others: dict[str, list[pd.DataFrame]] = {}
    for frame in results.deployed:
        for budget, rows in frame.groupby("budget", sort=False):
            of_others.setdefault(str(budget), []).append(rows)
    known = {student.budget: student for student in students}
    exported = {str(card.parity["budget"]): card.parity for card in results.cards}
    found = []
    for budget in dict.fromkeys([*known, *of_int8, *of_others]):
        student, rows = known.get(budget), list[dict[str, Any]]()
        if budget in of_int8:
            rows += _quantised(of_int8[budget])
        elif student is not None:
            rows.append(_exported(student, exported.get(budget, {})))
        for frame in of_others.get(budget, []):
            rows += [row for row in _final(frame) if row["file"] not in [other["file"] for other in rows]]
        if student is not None and rows and rows[0]["precision"] == "float32":
            rows[0] |= {name: student.final.get(name) for name in ("sram", "arena")}
        if student is not None:
            timed = student.final.get("latency_file")
            for row in rows:
                if row["file"] == (FLOAT if pd.isna(timed) else timed):
                    row["latency"] = student.final.get("latency")
        macs = student.macs if student is not None else max((row.get("macs") or 0 for row in rows), default=0)
        found += [DeviceFile(budget, macs, row) for row in rows]
    return sorted(found, key=lambda file: (file.macs, file.budget))


def device_figure(files: Sequence[DeviceFile]) -> tuple[Figure, dict[str, list[str]]] | None:
    """Robust accuracy with its interval over the measured time of one image; a line joins the files of a student.

    Returns
    -------
    tuple of (Figure, dict of str to list of str) or None
        The figure, and the tooltip of every point by group id. None without a measured time.
    """
    files = [file for file in files if file.known("latency_ms") and file.known("robust_acc") is not None]
    if not files:
        return None
    tooltips: dict[str, list[str]] = {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.3))
        axis = figure.subplots()
        for budget in dict.fromkeys(file.budget for file in files):
            points = [(file.row["latency_ms"], file.row["robust_acc"]) for file in files if file.budget == budget]
            axis.plot(*zip(*points, strict=True), color=COLOURS["muted"], linewidth=0.8, zorder=2)
            words: dict[str, Any] = {"textcoords": "offset points", "xytext": (7, -3), "fontsize": 8}
            axis.annotate(budget, max(points), **words, color=COLOURS["muted"])
        for index, label in enumerate(dict.fromkeys(file.label for file in files)):
            alike = [file for file in files if file.label == label]
            colour = COLOUR[alike[0].row["precision"]]
            marker = ONNX if label in COLOUR else OTHER
            times, robust = ([file.row[name] for file in alike] for name in ("latency_ms", "robust_acc"))
            ends = [file for file in alike if file.known("robust_acc_low") is not None]
            low, high = ([file.row[f"robust_acc_{end}"] for file in ends] for end in ("low", "high"))
            axis.vlines([file.row["latency_ms"] for file in ends], low, high, color=colour, linewidth=1.1, alpha=0.7)
            shown = axis.scatter(
                times, robust, s=36, marker=marker, facecolor=colour, edgecolor=COLOURS["paper"], linewidths=0.6,
                zorder=4, label=label,
            )  # fmt: skip
            shown.set_gid(f"device-{index}")
            tooltips[f"device-{index}"] = [_tooltip(file) for file in alike]
        times = [file.row["latency_ms"] for file in files]
        if max(times) > 3 * min(times):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(times) > 8 * min(times) else range(1, 10)))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(which="minor", length=0)
        else:
            axis.set_xlim(0, 1.25 * max(times))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_major_formatter(PERCENT)
        axis.margins(x=0.12)
        axis.set(xlabel="milliseconds of one image, measured, one CPU thread", ylabel="robust accuracy on test, %")
        figure.legend(loc="lower center", ncols=4)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure, tooltips


def _tooltip(file: DeviceFile) -> str:
    """Text of a point under the mouse pointer."""
    return (
        f"{file.budget}, {file.label} · {file.row['latency_ms']:.3f} ms · clean {percent(file.row['clean_acc'])} % · "
        f"robust {percent(file.row['robust_acc'])} %"
    )


def _quantised(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """float32 and int8 on test under all attacks, with the number of variants that were tried."""
    tried = frame[(frame["split"] == "val") & (frame["precision"] == "int8")]["variant"].nunique()
    rows = sorted(_final(frame), key=lambda row: list(COLOUR).index(row["precision"]))
    for row in rows:
        row["tried"] = tried
        if row["precision"] == "float32":  # its runtime is that of the accuracies; its time is from the run of int8
            row |= dict.fromkeys(("runtime", "cpu", "cpu_flags"))
    return rows


def _final(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table that are quoted: on test, under all attacks together where it has several."""
    if "split" in frame:
        frame = frame[frame["split"] == "test"]
    for name in (ALIKE, "worst"):
        if "attack" in frame and (frame["attack"] == name).any():
            frame = frame[frame["attack"] == name]
            break
    rows = frame.to_dict("records")
    for row in rows:
        if row["precision"] == "int8" and "agreement_clean" in row and "agreement_adversarial" in row:
            row["agreement"] = min(row["agreement_clean"], row["agreement_adversarial"])
    return rows


def _exported(student: Student, parity: Mapping[str, Any]) -> dict[str, Any]:
    """The exported float32 file as selection and export measured it."""
    final, timed = student.final, parity.get("latency", {})
    row = {name: final.get(name) for name in ("attack", "num_images")}
    row |= {f"{name}{end}": final.get(f"{name}{end}") for name in MEASURED for end in ("", "_low", "_high")}
    row |= {"file": FLOAT, "precision": "float32", "bytes": parity.get("bytes", {}).get(FLOAT)}
    return row | {"latency_ms": timed.get("median_ms"), "runtime": timed.get("runtime"), "cpu": timed.get("machine")}


def _said(files: Sequence[DeviceFile], names: Sequence[str]) -> list[str]:
    """Where the files were measured, each runtime and machine once."""
    texts = [", ".join(str(file.known(name)) for name in names if file.known(name)) for file in files]
    return list(dict.fromkeys(text for text in texts if text))
