"""Kinds of files that are timed: a runtime and a precision, each with a latency table of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proard.latency.graphs import Weights
    from proard.space import Part

RUNTIMES = ("onnxruntime", "executorch")


@dataclass(frozen=True)
class Kind:
    """Files of one runtime and precision.

    Attributes
    ----------
    runtime : str
        One of `RUNTIMES`.
    precision : str
        float32 or int8.
    file : str
        Name of a student's file of this kind.
    stage : str
        The stage that writes it.
    """

    runtime: str
    precision: str
    file: str
    stage: str

    @property
    def suffix(self) -> str:
        """Of the files' names."""
        return Path(self.file).suffix

    @property
    def words(self) -> tuple[str, ...]:
        """What is not the default, for names: nothing for float32 files of onnxruntime."""
        return tuple(word for word in (self.runtime, self.precision) if word not in (RUNTIMES[0], "float32"))


KINDS = (
    Kind("onnxruntime", "float32", "student.onnx", "export_student"),
    Kind("onnxruntime", "int8", "student.int8.onnx", "quantize_student"),
    Kind("executorch", "float32", "student.pte", "executorch_student"),
    Kind("executorch", "int8", "student.int8.pte", "executorch_student"),
)


def kind_of(runtime: str, precision: str) -> Kind:
    """The kind of a runtime and a precision."""
    return next(kind for kind in KINDS if (kind.runtime, kind.precision) == (runtime, precision))


def kind_of_file(name: str) -> Kind:
    """The kind of a student's file."""
    return next(kind for kind in KINDS if kind.file == name)


def writers(kind: Kind) -> tuple[Callable[[Part, Weights], bytes], Callable[[], bytes]]:
    """The function that gives a part with weights as a file, and that of a file that does nearly nothing.

    Their imports take seconds.

    Raises
    ------
    UserError
        The runtime's exporter is missing.
    """
    if kind.runtime == "executorch":
        from proard.export.executorch import require_executorch

        require_executorch("proard latency plan --runtime executorch")
        from proard.latency.programs import call_program, float_program, int8_program

        return (float_program if kind.precision == "float32" else int8_program), call_program
    from proard.latency.graphs import call_file, onnx_file
    from proard.latency.int8 import int8_file

    return (onnx_file if kind.precision == "float32" else int8_file), call_file
