"""The command `proard`: show a run's tables and costs in the terminal; check the machine before a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from proard import __version__
from proard.cli.estimate import add_estimate
from proard.cli.results import cost, fronts, students
from proard.cli.show import show
from proard.config import UserError
from proard.doctor.command import add_doctor
from proard.host import take_any_character
from proard.latency.command import add_latency, latency
from proard.runs.command import add_runs

PIPE_WIDTH = 2000  # characters of a line where no terminal sets a limit


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can fix is printed in one line, with exit status 1."""
    take_any_character()
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    try:
        if arguments.command == "show":
            columns = arguments.columns.split(",") if arguments.columns else None
            show(arguments.file, console, rows=arguments.rows, columns=columns)
        elif arguments.command == "cost":
            cost(arguments.run_folder, console, numbers=arguments.students, country=arguments.country)
        elif arguments.command == "fronts":
            fronts(arguments.first, arguments.second, console)
        elif arguments.command == "predict":
            from proard.export.usage import print_classes

            print_classes(arguments.student, arguments.images)
        elif arguments.command == "robustbench":
            from proard.export.robustbench import submit

            submit(arguments, console)
        elif arguments.command == "latency":
            latency(arguments, console)
        elif "call" in arguments:
            arguments.call(arguments, console)
        else:
            students(arguments.run_folder, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        sys.stderr.close()  # the reader (such as `head`) closed the pipe


def _parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="proard", description="Show a run's results; check a machine.")
    parser.add_argument("--version", action="version", version=f"proard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("show", help="a result table with its units and provenance")
    table.add_argument("file", metavar="FILE.parquet")
    table.add_argument("--rows", type=_row_count, default=20, metavar="N", help="rows to print (default 20; 0: all)")
    table.add_argument("--columns", metavar="A,B", help="only these columns")
    run = commands.add_parser("students", help="the exported students of a run")
    run.add_argument("run_folder", metavar="results/RUN")
    use = commands.add_parser("predict", help="classes that an exported student gives to image files")
    use.add_argument("student", metavar="FOLDER", help="of the export, or an ONNX file")
    use.add_argument("images", nargs="+", metavar="IMAGE")
    spent = commands.add_parser("cost", help="the costs of a run, compared with students trained one by one")
    spent.add_argument("run_folder", metavar="results/RUN")
    spent.add_argument("--students", type=_numbers, default=(1, 5, 20, 100), metavar="N,N", help="numbers of students")
    spent.add_argument("--country", default="USA", metavar="ABC", help="ISO 3166 code for CO2 equivalents (USA)")
    both = commands.add_parser("fronts", help="the measured fronts of two runs: hypervolumes and their difference")
    both.add_argument(
        "first", metavar="results/RUN", help="a run, or result tables: a .parquet file or a quoted pattern"
    )
    both.add_argument("second", metavar="results/OTHER", help="the same for the other run")
    listed = commands.add_parser("robustbench", help="the leaderboard's JSON and submission text of a student")
    listed.add_argument("folder", metavar="results/RUN/export_student/BUDGET")
    for name in ("title", "link", "authors", "venue"):
        listed.add_argument(f"--{name}", help="of the paper, for the leaderboard")
    listed.add_argument("--additional-data", choices=("yes", "no"), help="whether more training images were used")
    add_latency(commands)
    add_estimate(commands)
    add_doctor(commands)
    add_runs(commands)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers of students."""
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; write 1 or more, as in 1,5,20")
    return tuple(int(part) for part in text.split(","))


def _row_count(text: str) -> int:
    """A number of rows."""
    if text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of rows; write 0 or more")
