"""The page's sections on the run: its settings, its wall time, the origin of every number."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from proard import __version__
from proard.progress import duration
from proard.report.context import Context, Section, section
from proard.report.facts import machine, packages
from proard.report.text import count, plural, threat_words


def setup(context: Context) -> Section | None:
    """Data, settings and machine of the run."""
    settings, table = context.results.settings, context.results.get("table")
    entries = [
        ("Data", _data_words(context)),
        ("Images per split", _split_words(context.results.manifest)),
        ("Threat model", f"{threat_words(context.norm, context.eps)}, in pixel units of [0, 1]"),
        ("Attacks", _attack_words(context)),
        ("Search space", _space_words(settings.get("space"))),
    ]
    if table is not None:
        unique = table.drop_duplicates("arch_id")
        entries.append(
            (
                "Subnets measured",
                f"{len(unique):,}, from {count(unique['macs'].min())} to {count(unique['macs'].max())} MACs and from "
                f"{count(unique['params'].min())} to {count(unique['params'].max())} parameters",
            )
        )
    entries += [
        ("Teacher", _teacher_words(settings.get("train_teacher"), context.results.histories)),
        ("Phases", _phase_words(settings.get("train_phase"), context.results.histories)),
        ("Measurement", _measurement_words(settings.get("measurement"), table)),
    ]
    return section("setup", "What was run", "Data and settings of the run", entries=entries)


def _data_words(context: Context) -> str:
    """Source, image size and classes."""
    manifest = context.results.manifest
    if not manifest:
        return ""
    classes = [str(name) for name in manifest["classes"]]
    names = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
    height, width, channels = manifest["splits"]["train"]["image_shape"]
    size = f"{width} × {height} pixels, {plural(channels, 'channel')}"
    return f"{manifest['source']}: {size}, {len(classes)} classes ({names})"


def _split_words(manifest: Mapping[str, Any]) -> str:
    """Counts of every split."""
    counts = [f"{split} {entry['count']:,}" for split, entry in manifest.get("splits", {}).items()]
    of_train = manifest.get("splits", {}).get("train", {})
    if "additional" in of_train:
        counts.append(f"additional for training {of_train['additional']:,}, {of_train['share']:.0%} of every batch")
    return f"{' · '.join(counts)}. Choices are made on val; test is only reported" if counts else ""


def _attack_words(context: Context) -> str:
    """Every attack of the tables, once."""
    frames = [context.results.get("verified"), context.results.get("control_table"), context.results.get("table")]
    rows = pd.concat([frame for frame in frames if frame is not None] or [pd.DataFrame(columns=["attack"])])
    rows = rows.drop_duplicates("attack")
    lines = [Markup("<code>{}</code> {}").format(row["attack"], context.words(row)) for _, row in rows.iterrows()]
    return Markup("<br>").join(lines)


def _space_words(space: Mapping[str, Any] | None) -> str:
    """The elastic dims and their choices."""
    if not space:
        return ""
    names = [dim for dim in ("depth", "expand", "width", "kernel") if dim in space]
    dims = "; ".join(f"{dim} {', '.join(f'{choice:g}' for choice in space[dim])}" for dim in names)
    units = plural(len(space["units"]), "unit")
    return f"{space['name']} ({space['family']}, {space['block']} blocks, {units}): {dims}"


def _teacher_words(teacher: Mapping[str, Any] | None, histories: Sequence[pd.DataFrame] = ()) -> str:
    """How the teacher was trained, or its file."""
    if not teacher:
        return ""
    if teacher["source"] == "file":
        return Markup("read from <code>{}</code>").format(teacher["file"])
    words = {"pgd_at": "PGD adversarial training", "sat": "PGD adversarial training", "plain": "plain"}
    loss = teacher["objective"]
    objective = words.get(loss["name"], loss["name"].upper())
    beta = f", β {loss['beta']:g}" if "beta" in loss else ""
    length = _length_words("teacher", teacher, histories)
    schedule = f"{length}, batch {teacher['batch_size']}, {_optimizer_words(teacher)}"
    return f"{objective}{beta}, {schedule}"


def _length_words(name: str, training: Mapping[str, Any], histories: Sequence[pd.DataFrame]) -> str:
    """Epochs of a training; if it ended before those of its settings, the number that it made of them."""
    epochs = training["epochs"]
    for last in (history.iloc[-1] for history in histories if "planned_steps" in history):
        if last["phase"] == name and last["step"] < last["planned_steps"]:
            made = epochs * last["step"] / last["planned_steps"]
            return f"{made:.1f} of {epochs:g} epochs, in {duration(last['seconds'])}"
    return f"{epochs:g} epochs"


def _optimizer_words(training: Mapping[str, Any]) -> str:
    """The optimizer of a training and its highest learning rate."""
    names = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}
    return f"{names[training['optimizer']]} at learning rate {training['lr']:g}"


def _phase_words(settings: Mapping[str, Any] | None, histories: Sequence[pd.DataFrame] = ()) -> str:
    """The phases of progressive distillation."""
    if not settings:
        return ""
    return Markup("<br>").join(
        f"{phase['name']}: {_length_words(phase['name'], phase, histories)}, {_optimizer_words(phase)}, "
        f"{phase['loss']['name'].upper()}, "
        f"{phase['teacher']} teacher, {phase['sampling']} sampling, "
        f"{plural(phase['archs_per_step'], 'subnet')} per step"
        for phase in settings["phases"]
    )


def _measurement_words(settings: Mapping[str, Any] | None, table: pd.DataFrame | None) -> str:
    """What is equal in every measurement."""
    if not settings:
        return ""
    rule = {
        "any_iterate": "an image counts as misclassified if any iterate of the attack is",
        "last_iterate": "an image counts as misclassified if the attack's last iterate is",
    }[settings["accounting"]]
    mode = table["bn_mode"].dropna().unique() if table is not None and "bn_mode" in table else []
    attacked = f"; batch norm inside the attack: {', '.join(mode)}" if len(mode) else ""
    return (
        f"each subnet is extracted and its batch norm recalibrated on {settings['recalibration_images']:,} training "
        f"images; {rule}{attacked}"
    )


def time(context: Context) -> Section | None:
    """Wall time of every stage."""
    if not context.durations:
        return None
    counted = 0.0 if context.ledgers is None else float(context.ledgers["seconds"].sum())
    return section("time", "Time", "How long each stage took", durations=context.durations, counted=counted)


def provenance(context: Context) -> Section | None:
    """Seeds, versions, checksums, settings, machine."""
    results = context.results
    written = sorted({entry.version for entry in results.inputs if entry.version})
    facts = [
        ("Run", Markup("<code>{}</code>").format(results.run)),
        ("Seed", str(results.seed)),
        ("proard", f"{__version__}; tables written by {', '.join(written)}" if written else __version__),
        ("Packages", ", ".join(f"{name} {version}" for name, version in packages())),
        ("Page made on", "; ".join(f"{value}" for value in machine().values())),
    ]
    if context.ledgers is not None and "device" in context.ledgers:
        devices = context.ledgers["device"].dropna().unique().tolist()
        facts.insert(-1, ("Networks ran on", ", ".join(device.replace("cpu", "CPU") for device in devices)))
    settings = compact_json(results.settings)
    title = "Where the numbers come from"
    return section("provenance", "Provenance", title, context=context, facts=facts, settings=settings)


def compact_json(value: Any) -> str:
    """Indented JSON with lists of plain values on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return re.sub(
        r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
