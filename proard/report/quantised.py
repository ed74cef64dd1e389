"""The page's section on int8 files: what quantising loses, with both precisions attacked alike."""

from __future__ import annotations

from typing import Any

import pandas as pd

from proard.report.context import Context, Section, section


def quantised(context: Context) -> Section | None:
    """One row per student: float32 and int8 on the same test images."""
    if not context.results.quantised:
        return None
    pairs = sorted((_pair(frame) for frame in context.results.quantised), key=lambda pair: pair["int8"]["macs"])
    first = pairs[0]["int8"]
    return section("quantised", "int8", "The students in int8", context=context, pairs=pairs, first=first)


def _pair(frame: pd.DataFrame) -> dict[str, Any]:
    """The rows of one student on test under all attacks."""
    test = frame[(frame["split"] == "test") & (frame["attack"] == "union")].set_index("precision")
    tried = frame[(frame["split"] == "val") & (frame["precision"] == "int8")]["variant"].nunique()
    return {"budget": frame["budget"].iloc[0], "float": test.loc["float32"], "int8": test.loc["int8"], "tried": tried}
