"""`proard estimate`: memory and time of students on a microcontroller, as its compiler estimates them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

TARGETS = tuple(
    f"ethos-{family}-{macs}"
    for family, sizes in (
        ("u55", (32, 64, 128, 256)),
        ("u65", (256, 512)),
        ("u85", (128, 256, 512, 1024, 2048)),
    )
    for macs in sizes
)


def add_estimate(commands: Any) -> None:
    """Add the command's grammar."""
    parser = commands.add_parser("estimate", help="memory and time of a student on an Ethos-U, estimated by Vela")
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument(
        "students", nargs="+", metavar="STUDENT", help="folder of an export, or its student.safetensors"
    )
    parser.add_argument(
        "--python", metavar="PATH", help="of an environment that has environments/ethos-u/requirements.lock"
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.set_defaults(call=estimate_students)


def estimate_students(arguments: argparse.Namespace, console: Console) -> None:
    """Print one line per student.

    Raises
    ------
    UserError
        As of `export.ethos_u.estimate`.
    """
    from proard.export.ethos_u import estimate

    def say(line: str) -> None:
        Console(stderr=True, highlight=False).print(escape(line), soft_wrap=True)

    found = [
        estimate(student, arguments.target, python=arguments.python, say=say) | {"student": student}
        for student in arguments.students
    ]
    words = f"estimate by Vela {found[0]['vela']}"
    if arguments.json:
        print(json.dumps([{**entry, "source": words} for entry in found], indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("student", no_wrap=True)
    for name in ("MACs", "SRAM", "flash", "cycles", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in found:
        outside = next((entry[name] for name in ("flash_kib", "dram_kib") if entry[name] is not None), None)
        table.add_row(
            escape(entry["budget"]),
            f"{entry['macs'] / 1e3:,.0f} K",
            f"{entry['sram_kib']:.1f} KiB",
            "" if outside is None else f"{outside:.1f} KiB",
            f"{entry['cycles']:,}",
            f"{entry['milliseconds']:.3f} ms",
        )
    console.print(table)
    first = found[0]
    console.print(
        f"{words} for {first['target']} at {first['clock_mhz']:g} MHz ({first['system']}, {first['memory']}), int8; "
        "nothing was measured",
        soft_wrap=True,
    )
