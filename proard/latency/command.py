"""The words of `proard latency`."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proard.latency.kinds import RUNTIMES


def add_latency(commands: Any) -> None:
    """Add the command's grammar."""
    parser = commands.add_parser("latency", help="a device's latency table: write its files, fit it, check a student")
    actions = parser.add_subparsers(dest="action", required=True)
    plan = actions.add_parser("plan", help="a folder to copy to the device: files to time and bench.py")
    plan.add_argument("config", metavar="CONFIG", help="config file of a run")
    plan.add_argument("--out", required=True, metavar="FOLDER", help="written")
    plan.add_argument("--int8", action="store_true", help="time int8 files instead of float32 files")
    plan.add_argument(
        "--runtime", choices=RUNTIMES, default=RUNTIMES[0], help="that runs the files on the device (onnxruntime)"
    )
    fit = actions.add_parser("fit", help="the table of what bench.py measured, judged on subnets that were not fitted")
    fit.add_argument("folder", metavar="FOLDER", help="as it came back from the device, with bench.json")
    fit.add_argument("--out", default="latency", metavar="FOLDER", help="folder of the tables (latency)")
    fit.add_argument("--name", metavar="DEVICE", help="name of the table (default: that of the processor)")
    check = actions.add_parser("check", help="an exported student timed again: promise and measurement")
    check.add_argument("folder", metavar="STUDENT_FOLDER", help="results/RUN/export_student/BUDGET")
    check.add_argument("--device", metavar="FILE.json", help="latency table (default: that of the student's selection)")
    check.add_argument(
        "--measured", metavar="FILE.json", help="from bench.py and the student's file on the device (default: here)"
    )


def latency(arguments: argparse.Namespace, console: Console) -> None:
    """Run the command.

    Raises
    ------
    UserError
        As of `plan`, `fit` and `check`.
    """
    from proard.latency.check import check
    from proard.latency.fit import fit
    from proard.latency.plan import plan

    if arguments.action == "plan":
        manifest = plan(arguments.config, arguments.out, int8=arguments.int8, runtime=arguments.runtime)
        _print_plan(manifest, arguments.out, console)
    elif arguments.action == "fit":
        path, content = fit(arguments.folder, out=arguments.out, name=arguments.name)
        _print_fit(str(path), content, console)
    else:
        _print_check(check(arguments.folder, device=arguments.device, measured=arguments.measured), console)


def _print_plan(manifest: dict[str, Any], folder: str, console: Console) -> None:
    """What was written, and the next two steps."""
    kinds = [entry["kind"] for entry in manifest["files"].values()]
    parts, subnets = kinds.count("part"), kinds.count("subnet")
    console.print(
        f"{parts} blocks and {subnets} subnets of space {escape(manifest['space']['name'])}, "
        f"{manifest['precision']} for {manifest['runtime']}: {escape(folder)}"
    )
    console.print(f"on the device, which needs numpy and {manifest['runtime']}: python bench.py")
    console.print(f"then here, with bench.json in the folder: proard latency fit {escape(folder)}")


def _print_fit(path: str, content: dict[str, Any], console: Console) -> None:
    """The errors on the unseen subnets, and what the table uses."""
    low, high = content["unseen_ms"]
    console.print(
        f"{content['precision']} on {escape(content['machine']['processor'])}, {content['runtime']}, "
        f"{content['threads']} threads; "
        f"{content['num_fitted']} subnets fitted; on {content['num_unseen']} others, {low:.3g} to {high:.3g} ms:"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("predicted by", "mean error", "p90", "within 5 %", "within 10 %", "Kendall"):
        table.add_column(name, justify="left" if name == "predicted by" else "right", no_wrap=True)
    words = {"table": "block times", "macs": "MACs alone", "both": "both", "noise": "the first pass (noise)"}
    for model, quality in content["quality"].items():
        shares = [f"{quality[name]:.1%}" for name in ("mean_error", "p90_error")]
        shares += [f"{quality[name]:.0%}" for name in ("within_5", "within_10")]
        mark = "  <- used" if model == content["model"]["uses"] else ""
        table.add_row(words[model] + mark, *shares, f"{quality['kendall']:.3f}")
    console.print(table)
    console.print(f"table: {escape(path)}; in the config: device: {escape(path)}")


def _print_check(record: dict[str, Any], console: Console) -> None:
    """Promise and measurement."""
    console.print(
        f"{record['file']}: promised {record['promised_ms']:.4g} ms for {escape(record['device'])}, "
        f"measured {record['measured_ms']:.4g} ms (median {record['median_ms']:.4g}, p90 {record['p90_ms']:.4g}): "
        f"{record['error']:+.1%}; noise {record['noise']:.1%}"
    )
    if record["met"] is not None:
        console.print(f"budget {record['budget_ms']:.4g} ms: {'met' if record['met'] else 'NOT met'}")
    if not record["is_the_device"]:
        console.print(f"[dim]measured on {escape(record['processor'])}, {record['runtime']}: not the table's device[/]")
