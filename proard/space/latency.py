"""Latency of subnets on one device, predicted from what was measured there (`proard latency`, docs/latency.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proard.config import UserError
from proard.space.parts import Part

FORMAT = "proard latency table 1"


@dataclass(frozen=True)
class LatencyTable:
    """latency = base + sum over parts of (factor * measured time of the part + slope * its MACs), in milliseconds.

    Attributes
    ----------
    device : str
        Its name.
    uses : str
        `table`, `macs` or `both`: which of factor and slope are not zero.
    base_ms, factor, ms_per_mac : float
        Fitted on whole subnets.
    parts_ms : mapping of str to float
        By key of a part, its measured time without the overhead of a call.
    facts : mapping
        The rest of the file: machine, runtime, threads, noise, errors on subnets that were not fitted.
    """

    device: str
    uses: str
    base_ms: float
    factor: float
    ms_per_mac: float
    parts_ms: Mapping[str, float]
    facts: Mapping[str, Any]

    @property
    def precision(self) -> str:
        """Of the files that were timed: float32 or int8. Tables of versions that timed no int8 files lack the key."""
        return str(self.facts.get("precision", "float32"))

    @property
    def file(self) -> str:
        """Name of the student's file that it predicts. Tables of versions that timed ONNX files alone lack the key."""
        return str(self.facts.get("file", "student.onnx" if self.precision == "float32" else "student.int8.onnx"))

    def of_part(self, part: Part) -> float:
        """Milliseconds that a part adds.

        Raises
        ------
        UserError
            The part is not in the table.
        """
        if not self.factor:
            return self.ms_per_mac * part.macs
        if part.key not in self.parts_ms:
            raise UserError(
                f"the latency table of {self.device} lacks blocks of this space; "
                "write and measure them: proard latency plan CONFIG --out FOLDER"
            )
        return self.factor * self.parts_ms[part.key] + self.ms_per_mac * part.macs


def read_device(path: str | Path | None) -> LatencyTable | None:
    """Read the file that `proard latency fit` wrote; None for None.

    Raises
    ------
    UserError
        The file is missing, or no latency table.
    """
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        model = content["model"]
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        base, factor, slope = (float(model[name]) for name in ("base_ms", "factor", "ms_per_mac"))
        parts = {str(key): float(value) for key, value in content["parts_ms"].items()}
        return LatencyTable(str(content["device"]), str(model["uses"]), base, factor, slope, parts, content)
    except OSError as error:
        raise UserError(f"device {path} cannot be read ({error.strerror}); proard latency fit writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"device {path} is no latency table ({error}); proard latency fit writes one") from None
