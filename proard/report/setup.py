"""The page's sections on circumstances: what was run, how long it took, where every number comes from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from proard import __version__
from proard.progress import duration
from proard.report.facts import machine, packages
from proard.report.text import attack_words, count, plural, threat_words
from proard.report.view import Section, View, cell, definitions, head


def setup(view: View) -> Section | None:
    """What was run, on what."""
    settings, table = view.results.settings, view.results.get("table")
    entries = [
        ("Data", _data_words(view)),
        ("Images per split", _split_words(view.results.manifest)),
        ("Threat model", f"{escape(threat_words(view.norm, view.eps))}, in pixel units of [0, 1]"),
        ("Attacks", _attack_words(view)),
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
        ("Teacher", _teacher_words(settings.get("train_teacher"))),
        ("Phases", _phase_words(settings.get("train_phase"))),
        ("Measurement", _measurement_words(settings.get("measurement"), table)),
    ]
    return Section("setup", "What was run", "What was run, on what", definitions(entries))


def _data_words(view: View) -> str:
    """Source, image size and classes."""
    manifest = view.results.manifest
    if not manifest:
        return ""
    classes = [str(name) for name in manifest["classes"]]
    names = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
    height, width, channels = manifest["splits"]["train"]["image_shape"]
    size = f"{width} × {height} pixels, {plural(channels, 'channel')}"
    return escape(f"{manifest['source']}: {size}, {len(classes)} classes ({names})")


def _split_words(manifest: Mapping[str, Any]) -> str:
    """Counts of every split."""
    counts = [f"{split} {entry['count']:,}" for split, entry in manifest.get("splits", {}).items()]
    return f"{escape(' · '.join(counts))}. Choices are made on val; test is only reported" if counts else ""


def _attack_words(view: View) -> str:
    """Every attack of the tables, once."""
    frames = [view.results.get("verified"), view.results.get("control_table"), view.results.get("table")]
    rows = pd.concat([frame for frame in frames if frame is not None] or [pd.DataFrame(columns=["attack"])])
    rows = rows.drop_duplicates("attack")
    return "<br>".join(
        f"<code>{escape(str(row['attack']))}</code> {escape(attack_words(row, view.objective(str(row['attack']))))}"
        for _, row in rows.iterrows()
    )


def _space_words(space: Mapping[str, Any] | None) -> str:
    """The elastic dims and their choices."""
    if not space:
        return ""
    names = [dim for dim in ("depth", "expand", "width", "kernel") if dim in space]
    dims = "; ".join(f"{dim} {', '.join(f'{choice:g}' for choice in space[dim])}" for dim in names)
    units = plural(len(space["units"]), "unit")
    return escape(f"{space['name']} ({space['family']}, {space['block']} blocks, {units}): {dims}")


def _teacher_words(teacher: Mapping[str, Any] | None) -> str:
    """How the teacher came to be."""
    if not teacher:
        return ""
    if teacher["source"] == "file":
        return f"read from <code>{escape(str(teacher['file']))}</code>"
    words = {"pgd_at": "PGD adversarial training", "sat": "PGD adversarial training", "plain": "plain"}
    objective = words.get(teacher["objective"], str(teacher["objective"]).upper())
    beta = f", β {teacher['beta']:g}" if teacher["objective"] in ("trades", "mart", "hat") else ""
    schedule = f"{teacher['epochs']:g} epochs, batch {teacher['batch_size']}, {_optimizer_words(teacher)}"
    return escape(f"{objective}{beta}, {schedule}")


def _optimizer_words(training: Mapping[str, Any]) -> str:
    """The optimizer of a training and its highest learning rate; settings leave the default one out."""
    names = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}
    return f"{names[training.get('optimizer', 'sgd')]} at learning rate {training['lr']:g}"


def _phase_words(section: Mapping[str, Any] | None) -> str:
    """The legs of progressive distillation."""
    if not section:
        return ""
    return "<br>".join(
        escape(
            f"{phase['name']}: {phase['epochs']:g} epochs, {_optimizer_words(phase)}, {phase['loss'].upper()}, "
            f"{phase['teacher']} teacher, "
            f"{phase['sampling']} sampling, {plural(phase['archs_per_step'], 'subnet')} per step"
        )
        for phase in section["phases"]
    )


def _measurement_words(settings: Mapping[str, Any] | None, table: pd.DataFrame | None) -> str:
    """What every measurement shares."""
    if not settings:
        return ""
    rule = {
        "any_iterate": "an image is lost if any iterate of the attack is misclassified",
        "last_iterate": "an image is lost if the attack's last iterate is misclassified",
    }[settings["accounting"]]
    mode = table["bn_mode"].dropna().unique() if table is not None and "bn_mode" in table else []
    attacked = f"; batch norm inside the attack: {', '.join(mode)}" if len(mode) else ""
    return escape(
        f"each subnet is extracted and its batch norm recalibrated on {settings['recalibration_images']:,} training "
        f"images; {rule}{attacked}"
    )


def time(view: View) -> Section | None:
    """Wall time of every stage."""
    if not view.durations:
        return None
    longest = max(entry.seconds for entry in view.durations)
    total = sum(entry.seconds for entry in view.durations)
    rows = ""
    for entry in view.durations:
        width = 100 * entry.seconds / max(longest, 1e-9)
        cells = [
            cell(f"<code>{escape(entry.stage)}</code>", "nowrap"),
            cell(str(entry.jobs)),
            cell(duration(entry.seconds), "nowrap"),
            cell(f'<span class="bar" style="width:{width:.1f}%"></span>', "bars"),
            cell("–" if entry.memory_mb is None else f"{entry.memory_mb / 1024:.1f}"),
        ]
        rows += f"<tr>{''.join(cells)}</tr>"
    heads = [head("stage"), head("jobs"), head("wall time"), head(""), head("peak GiB")]
    body = f"""<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>{rows}</tbody></table></div>
<p class="caption">{duration(total)} in all: wall time of each stage's jobs, summed; jobs that ran side by side make the
run shorter than that. From Snakemake's benchmark records: the start of Python and its libraries included, and of a job
that was interrupted and continued the last start only.{_other_time(view)}</p>"""
    return Section("time", "Time", "How long each stage took", body)


def _other_time(view: View) -> str:
    """How the section on costs counts time, and what it comes to."""
    if view.ledgers is None or view.ledgers.empty:
        return ""
    total = duration(float(view.ledgers["seconds"].sum()))
    return (
        f' <a href="#costs">What it cost</a> counts {total}: each job from the reading of its command line on, and all '
        "starts of an interrupted training."
    )


def provenance(view: View) -> Section | None:
    """Seeds, versions, checksums, settings, machine."""
    results = view.results
    facts = [("Run", f"<code>{escape(results.run)}</code>"), ("Seed", str(results.seed))]
    written = sorted({entry.version for entry in results.inputs if entry.version})
    facts.append(
        ("proard", escape(f"{__version__}; tables written by {', '.join(written)}" if written else __version__))
    )
    facts.append(("Packages", escape(", ".join(f"{name} {version}" for name, version in packages()))))
    facts.append(("Page made on", escape("; ".join(f"{value}" for value in machine().values()))))
    rows = ""
    for entry in results.inputs:
        name = cell(view.link(entry.path, _short(entry.path, view.folder)), "nowrap")
        rows += f"<tr>{name}{cell(entry.sha256, 'left', 'checksum')}</tr>"
    heads = head("file") + head("SHA-256", "left")
    body = f"""{definitions(facts)}
<details><summary>Settings of every stage</summary><pre>{escape(compact_json(results.settings))}</pre></details>
<details><summary>Files this page was made from ({len(results.inputs)})</summary>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"""
    return Section("provenance", "Provenance", "Where the numbers come from", body)


def _short(path: Path, folder: Path) -> str:
    """A path as seen from the run's folder, the page's folder being one of its stages."""
    return Path(os.path.relpath(path, folder.parent)).as_posix()


def compact_json(value: Any) -> str:
    """Indented JSON with lists of plain values on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return re.sub(
        r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
