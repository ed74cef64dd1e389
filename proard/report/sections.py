"""The page's sections on results: students, cost and accuracy, search, predictor, training."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import pandas as pd

from proard.report.cost_page import costs
from proard.report.diagnosis import diagnosis
from proard.report.facts import Student, rows_by_attack
from proard.report.setup import provenance, setup, time
from proard.report.students import trained_students
from proard.report.text import SEARCH_NAMES, attack_words, count, percent, plural
from proard.report.view import Section, View, accuracy, cell, head

FILES = (("student.onnx", "onnx"), ("student.pt2", "pt2"), ("student.safetensors", "weights"), ("card.md", "card"))


def students(view: View) -> Section | None:
    """The table of exported students."""
    if not view.students:
        return None
    final = view.best.final
    attacks = [name for name in view.students[0].test if name != final["attack"]]
    label = _val_attack(view)
    groups = [
        head("", span=3),
        head("measured on test", "edge", span=2 + len(attacks)),
        head("predicted → val", "edge", span=2),
        head("files", "edge"),
    ]
    heads = [head("budget"), head("MACs"), head("params"), head("clean", "edge"), head("robust")]
    heads += [head(escape(name)) for name in attacks]
    heads += [head("clean", "edge"), head("robust"), head("with ONNX parity", "edge", "left")]
    rows = "\n".join(_student_row(view, student, attacks, label) for student in view.students)
    words = [f"Robust: {escape(_words(view, final))}"]
    words += [f"{escape(name)}: {escape(_words(view, view.students[0].test[name]))}" for name in attacks]
    measured = escape(label or "the attack")
    body = f"""<p>One row per budget: the subnet that did best on val among the few that the predictor proposed,
extracted with its own weights. The star marks the most robust. The control was trained plainly.</p>
<div class="scroll"><table class="students">
<thead><tr class="groups">{"".join(groups)}</tr><tr>{"".join(heads)}</tr></thead>
<tbody>{rows}
{_control_row(view, attacks)}</tbody></table></div>
<p class="caption">Accuracies in percent on {int(final["num_images"]):,} test images; the small ranges are 95 % Wilson
intervals. {"; ".join(words)}. Beside them, what the predictor expected and what {measured}
then measured on val: predictions chose the candidates, they are no result. The exported ONNX file was run beside
PyTorch on {_parity_images(view)}: shown are the share of equal top-1 answers and the largest difference of
softmax.</p>"""
    return Section("students", "Students", "The students", body)


def _words(view: View, row: pd.Series) -> str:
    """The attack of a row in words."""
    return attack_words(row, view.objective(str(row["attack"])))


def _val_attack(view: View) -> str | None:
    """Attack whose val measurement stands beside the predictions: the one that the predictor learnt."""
    attack, first = view.results.label_attack, view.students[0].val
    return attack if attack in first else next(iter(first), None)


def _student_row(view: View, student: Student, attacks: list[str], label: str | None) -> str:
    """One student."""
    measured = student.val.get(label or "")
    kind = "student best" if student is view.best else "student"
    cells = [
        cell(escape(student.budget), "nowrap"),
        cell(count(student.macs), "nowrap"),
        cell(count(student.params), "nowrap"),
        accuracy(student.final, "clean_acc", "strong", "edge"),
        accuracy(student.final, "robust_acc", "strong"),
    ]
    cells += [accuracy(student.test.get(name), "robust_acc") for name in attacks]
    for column, predicted in (("clean_acc", student.predicted_clean_acc), ("robust_acc", student.predicted_robust_acc)):
        edge = ["edge"] if column == "clean_acc" else []
        found = percent(None if measured is None else measured[column])
        cells.append(cell(f"{percent(predicted)} → {found}", "quiet", "nowrap", *edge))
    return f'<tr class="{kind}">{"".join(cells)}{_files(view, student)}</tr>'


def _files(view: View, student: Student) -> str:
    """Parity and links of an exported student."""
    card = view.card(student.budget)
    if card is None:
        return cell("–", "edge", "left")
    parity = card.parity
    links = "".join(view.link(card.folder / name, short) for name, short in FILES)
    agreement = percent(parity["onnx_top1_agreement"], 2).removesuffix(".00")
    words = (
        f"{'✓' if parity['passed'] else '✗ failed:'} {agreement} % equal, Δ {parity['onnx_max_softmax_difference']:.0e}"
    )
    return cell(f'{links}<span class="rangy">{words}</span>', "edge", "left", "files")


def _parity_images(view: View) -> str:
    """How many images the parity was checked on."""
    numbers = {card.parity.get("num_images") for card in view.results.cards} - {None}
    return f"{min(numbers):,} images" if numbers else "images"


def _control_row(view: View, attacks: list[str]) -> str:
    """The plainly trained network, for comparison."""
    row, table = view.control_on_test, view.results.get("control_table")
    if row is None or table is None:
        return ""
    by_attack = rows_by_attack(table, "test")
    cells = [
        cell("control"),
        cell(count(row["macs"]), "nowrap"),
        cell(count(row["params"]), "nowrap"),
        accuracy(row, "clean_acc", "edge"),
        accuracy(row, "robust_acc"),
        *(accuracy(by_attack.get(name), "robust_acc") for name in attacks),
        cell("", "edge", span=2),
        cell("", "edge"),
    ]
    return f'<tr class="reference">{"".join(cells)}</tr>'


def tradeoff(view: View) -> Section | None:
    """The figure of accuracy over cost."""
    table = view.results.get("table")
    if table is None or "front" not in view.figures:
        return None
    row = table.iloc[0]
    parts = [
        f"Dots: {plural(len(table), 'sampled subnet')}, measured on {int(row['num_images']):,} val images under "
        f"{escape(str(row['attack']))} ({escape(_words(view, row))})."
    ]
    if view.results.get("front") is not None:
        parts.append("Dashed: the best that the predictor promised up to each cost, of what each search found.")
    verified = view.results.get("verified")
    if verified is not None:
        rows = verified[(verified["split"] == "val") & (verified["attack"] == view.results.label_attack)]
        if len(rows):
            numbers = {words: int((rows["found_by"] == name).sum()) for name, words in SEARCH_NAMES.items()}
            found = " and ".join(f"{number} of {words}" for words, number in numbers.items() if number)
            images = int(rows["num_images"].iloc[0])
            parts.append(
                f"Filled marks: searched archs as measured afterwards, {found}, on {images:,} val images under the "
                "same attack, with 95 % intervals."
            )
    if view.students:
        final = view.best.final
        parts.append(
            f"Stars: exported students on {int(final['num_images']):,} test images, {escape(_words(view, final))}; the "
            "stricter attack is why they may lie below their marks on val."
        )
    parts.append(_reference_words(view))
    caption = " ".join(part for part in parts if part)
    return Section("tradeoff", "Accuracy over cost", "Accuracy over cost", view.figure("front", caption))


def _reference_words(view: View) -> str:
    """How the horizontal lines were measured."""
    parts = []
    history = view.results.get("teacher_history")
    if history is not None and history["val_robust_acc"].notna().any():
        settings = view.results.settings.get("train_teacher", {}).get("validation", {})
        steps = f"PGD with {settings['num_steps']} steps" if "num_steps" in settings else "the validation's PGD"
        images = history.get("val_num_images")
        on = "" if images is None or images.isna().all() else f" on {int(images.max()):,} val images"
        parts.append(f"teacher under {steps}{on}")
    if view.results.get("control_table") is not None:
        parts.append("control on val, under the dots' attack where it was measured with it")
    return f"Lines: {'; '.join(parts)}; an arrow marks a line beyond the axis." if parts else ""


def search(view: View) -> Section | None:
    """NSGA-II against random search: predicted while searching, measured afterwards."""
    if "search" not in view.figures and view.comparison is None:
        return None
    body = ""
    if "search" in view.figures:
        history = view.results.frames["search_history"]
        spent = int(history.loc[history["search"] == "nsga2", "evaluations"].max())
        body += view.figure(
            "search",
            "Hypervolume of all archs found so far, on predicted values: how well each search serves the predictor, "
            f"with {spent:,} evaluations for each. The measured comparison follows.",
        )
    body += _comparison_words(view)
    return Section("search", "Search", "NSGA-II against random search", body)


def _comparison_words(view: View) -> str:
    """The measured comparison, with its definition."""
    found = view.comparison
    if found is None:
        return ""
    verdict = "The interval spans zero: no difference is shown"
    if found.low > 0:
        verdict = "NSGA-II's archs are better, beyond the interval"
    elif found.high < 0:
        verdict = "Random search's archs are better, beyond the interval"
    counts = (
        f"{found.num_nsga2} archs of each"
        if found.num_nsga2 == found.num_random
        else f"{found.num_nsga2} archs of NSGA-II, {found.num_random} of random search"
    )
    attack = "worst case per image over all attacks" if found.attack == "worst" else escape(found.attack)
    return f"""<h3>Measured afterwards</h3>
<p class="verdict">Hypervolume {found.nsga2:.4f} for NSGA-II, {found.random:.4f} for random search: difference
<strong>{_signed(found.difference)}</strong>, 95 % interval {_signed(found.low)} to {_signed(found.high)}.
{verdict}.</p>
<p class="caption">{counts}, measured on {found.split}, {attack}. Every arch is a point of clean
accuracy, robust accuracy and {escape(found.cost)}, each scaled to the range that these archs span; the hypervolume is
the share of the box, from the best corner to 1.1 times the range, that a search's archs dominate. The interval:
percentiles 2.5 to 97.5 of the difference over {found.bootstraps:,} redraws, with replacement, of each search's archs.
It speaks of which archs were found, not of another sample of images.</p>"""


def _signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def predictor(view: View) -> Section | None:
    """Predicted against measured on held-out archs, and what the label noise allows."""
    quality = view.results.get("quality")
    if quality is None and "predictor" not in view.figures:
        return None
    body = ""
    if "predictor" in view.figures:
        number = len(view.results.frames["held_out"])
        body += view.figure(
            "predictor",
            (
                f"{plural(number, 'held-out arch')} that the model had not seen, measured on val under "
                f"{escape(view.results.label_attack or 'the attack')}; the line is equality."
            ),
        )
    if quality is not None:
        body += _quality_table(quality)
    return Section("predictor", "Predictor", "Does the predictor rank subnets?", body)


def _quality_table(quality: pd.DataFrame) -> str:
    """All models, the kept one marked."""
    names = {"clean_acc": "clean", "robust_acc": "robust"}
    columns = [("cv_tau", "τ, cross-val."), ("kendall_tau", "τ, held out"), ("noise_ceiling", "ceiling of τ")]
    columns += [
        ("spearman", "Spearman"),
        ("r2", "R²"),
        ("rmse", "RMSE, points"),
        ("top_k_regret", "top-k regret, points"),
    ]
    columns = [(column, label) for column, label in columns if column in quality]
    rows = ""
    ordered = quality.sort_values(["target", "chosen"], ascending=[False, False], kind="stable")
    for _, row in ordered.iterrows():
        kind = "best" if row["chosen"] else "other"
        cells = [cell(escape(str(row["model"]))), cell(names.get(row["target"], "?"), "left")]
        cells += [cell(_quality_value(row, column)) for column, _ in columns]
        rows += f'<tr class="{kind}">{"".join(cells)}</tr>'
    heads = "".join(head(label) for _, label in columns)
    held_out = int(quality["num_held_out"].iloc[0])
    return f"""<div class="scroll"><table><thead><tr>{head("model")}{head("target", "left")}{heads}</tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="caption">{held_out} held-out archs; ranges are 95 % bootstrap intervals. Labels are measured on finitely many
images and therefore noisy: the ceiling, Kendall τ between two disjoint halves of those images, says how well the
measurement agrees with itself. The star marks the model kept by cross-validation on the other archs.</p>"""


def _quality_value(row: pd.Series, column: str) -> str:
    """One quality figure with its interval."""
    value = row[column]
    if pd.isna(value):
        return "–"
    if column in ("rmse", "top_k_regret"):
        return percent(value, 2)
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    known = low is not None and high is not None and not pd.isna(low) and not pd.isna(high)
    below = f'<span class="rangy">{low:.2f}–{high:.2f}</span>' if known else ""
    return f"{value:.2f}{below}"


def training(view: View) -> Section | None:
    """Curves of every training."""
    if "training" not in view.figures:
        return None
    counts = [frame["val_num_images"].max() for frame in view.results.histories if "val_num_images" in frame]
    images = [int(number) for number in counts if not pd.isna(number)]
    on = f" on {min(images):,} val images" if images else " on val"
    caption = (
        f"Dashed: clean accuracy{on}; solid: robust accuracy under the short PGD of training's validation, which is "
        "weaker than the attacks above. The vertical line is the epoch whose weights were kept, chosen on val. Below: "
        "the mean training loss of each epoch; losses of different objectives do not compare."
    )
    return Section("training", "Training", "Training, leg by leg", view.figure("training", caption))


ORDER: tuple[Callable[[View], Section | None], ...] = (
    students,
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
