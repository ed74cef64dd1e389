"""The page's sections on results: students, cost and accuracy, search, predictor, training."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from proard.report.context import Context, Section, section
from proard.report.cost_page import costs
from proard.report.device import device
from proard.report.diagnosis import diagnosis
from proard.report.facts import rows_by_attack
from proard.report.setup import provenance, setup, time
from proard.report.students import trained_students
from proard.report.text import SEARCH_NAMES
from proard.report.trust import autoattack, checks

FILES = (("student.onnx", "onnx"), ("student.pt2", "pt2"), ("student.safetensors", "weights"), ("card.md", "card"))
QUALITY = {
    "cv_tau": "τ, cross-val.",
    "kendall_tau": "τ, held out",
    "noise_ceiling": "ceiling of τ",
    "spearman": "Spearman",
    "r2": "R²",
    "rmse": "RMSE, points",
    "top_k_regret": "top-k regret, points",
}


def students(context: Context) -> Section | None:
    """The table of exported students."""
    if not context.students:
        return None
    first, label = context.students[0], context.results.label_attack
    control = context.results.get("control_table")
    return section(
        "students",
        "Students",
        "The students",
        context=context,
        attacks=[name for name in first.test if name != context.best.final["attack"]],
        val_attack=label
        if label in first.val
        else next(iter(first.val), None),  # the attack of the predictor's training data
        files=FILES,
        parity_images=min(
            (card.parity["num_images"] for card in context.results.cards if "num_images" in card.parity), default=0
        ),
        control_by_attack={} if control is None else rows_by_attack(control, "test"),
    )


def tradeoff(context: Context) -> Section | None:
    """The figure of accuracy over cost."""
    table, verified = context.results.get("table"), context.results.get("verified")
    if table is None or "front" not in context.figures:
        return None
    found, images = [], 0
    if verified is not None:
        rows = verified[(verified["split"] == "val") & (verified["attack"] == context.results.label_attack)]
        numbers = {words: int((rows["found_by"] == name).sum()) for name, words in SEARCH_NAMES.items()}
        found = [f"{number} of {words}" for words, number in numbers.items() if number]
        images = int(rows["num_images"].max()) if len(rows) else 0
    values = {"table": table, "row": table.iloc[0], "found": found, "images": images, "lines": _lines(context)}
    return section("tradeoff", "Accuracy over cost", "Accuracy over cost", context=context, **values)


def _lines(context: Context) -> list[str]:
    """How the horizontal lines were measured."""
    lines = []
    history = context.results.get("teacher_history")
    if history is not None and history["val_robust_acc"].notna().any():
        settings = context.results.settings.get("validation", {})
        steps = f"PGD with {settings['num_steps']} steps" if "num_steps" in settings else "the validation's PGD"
        images = history.get("val_num_images")
        on = "" if images is None or images.isna().all() else f" on {int(images.max()):,} val images"
        lines.append(f"teacher under {steps}{on}")
    if context.results.get("control_table") is not None:
        lines.append("control on val, under the dots' attack if measured with it")
    return lines


def search(context: Context) -> Section | None:
    """NSGA-II beside random search and uniform scaling: predicted while searching, measured afterwards."""
    if "search" not in context.figures and not context.comparisons:
        return None
    history = context.results.get("search_history")
    spent = 0 if history is None else history.loc[history["search"] == "nsga2", "evaluations"].max()
    values = {"context": context, "spent": spent, "names": SEARCH_NAMES}
    return section("search", "Search", "Does the search matter?", **values)


def predictor(context: Context) -> Section | None:
    """Predicted against measured on held-out archs, and the ceiling from label noise."""
    quality = context.results.get("quality")
    if quality is None and "predictor" not in context.figures:
        return None
    rows, columns = [], {}
    if quality is not None:
        ordered = quality.sort_values(["target", "chosen"], ascending=[False, False], kind="stable")
        rows = ordered.to_dict("records")
        columns = {column: label for column, label in QUALITY.items() if column in quality}
    return section(
        "predictor", "Predictor", "Does the predictor rank subnets?", context=context, rows=rows, columns=columns
    )


def training(context: Context) -> Section | None:
    """Curves of every training."""
    if "training" not in context.figures:
        return None
    counts = [frame["val_num_images"].max() for frame in context.results.histories if "val_num_images" in frame]
    images = [number for number in counts if not pd.isna(number)]
    return section("training", "Training", "Training, phase by phase", context=context, images=images)


ORDER: tuple[Callable[[Context], Section | None], ...] = (
    students,
    autoattack,
    checks,
    device,
    tradeoff,
    search,
    predictor,
    training,
    trained_students,
    diagnosis,
    setup,
    time,
    costs,
    provenance,
)
