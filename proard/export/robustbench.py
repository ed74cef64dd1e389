"""What RobustBench asks for with a new model: its rules checked, the leaderboard's JSON, the text, and a loader."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from proard.artifacts import (
    AUTOATTACK,
    AUTOATTACK_UNION,
    read_header,
    read_metadata,
    read_table,
    sha256,
    write_json,
    write_text,
)
from proard.config import UserError
from proard.export import plain
from proard.export.trust import percent_interval

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
TEST_IMAGES = 10_000
RADII = {("cifar10", "linf"): 8 / 255, ("cifar10", "l2"): 0.5, ("cifar100", "linf"): 8 / 255}
NORMS = {"linf": "Linf", "l2": "L2"}
WRITTEN = ("robustbench.json", "robustbench.md", "load_student.py")
TO_FILL = "TO BE FILLED IN"

TEXT = """\
# New model: {name}

**Paper**: {paper}
**Link**: {link}
**Authors**: {authors}
**Venue**: {venue}

**Data set and threat model**: {dataset}, {norm}, eps = {eps}

| | |
|---|---|
| Architecture | {architecture}, {params:,} parameters, {macs:,} multiply-accumulates of one image |
| Clean accuracy | {clean} |
| Robust accuracy, {version} | {robust} |
| Test images | {num_images:,} |
| Additional data | {additional} |
| Forward passes at inference | 1 |
| Licence | {license} |

**Checkpoint**: `student.pt2`, sha256 `{checksum}`, a torch.export archive. Needs no code but torch:

```python
from load_student import load_student
model = load_student("student.pt2")  # a torch.nn.Module: images in [0, 1] -> logits; normalisation is inside
```

The forward pass is deterministic, has no optimisation loop and gives logits; gradients with respect to the input are
those of the network. Every image that is classified correctly was attacked with the standard version.
"""


@dataclass(frozen=True)
class Publication:
    """What the leaderboard says about the model beside its figures; what is not given remains to be filled in."""

    title: str = TO_FILL
    link: str = TO_FILL
    authors: str = TO_FILL
    venue: str = "Unpublished"
    additional_data: bool | None = None


def submit(arguments: argparse.Namespace, console: Console) -> None:
    """Run the command `proard robustbench`: write the files and name them.

    Raises
    ------
    UserError
        The student does not meet the leaderboard's rules.
    """
    given = {name: getattr(arguments, name) for name in ("title", "link", "authors", "venue")}
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.additional_data is not None:
        known["additional_data"] = arguments.additional_data == "yes"
    for path in submission(arguments.folder, Publication(**known)):
        unfinished = TO_FILL in path.read_text(encoding="utf-8")
        console.print(f"{path}{f'  [dim]{TO_FILL}: see the file[/]' if unfinished else ''}", soft_wrap=True)


def submission(folder: str | Path, publication: Publication) -> list[Path]:
    """Check the rules and write the leaderboard's JSON, the text of a submission and a loader beside the student.

    Parameters
    ----------
    folder : path
        `results/RUN/export_student/BUDGET`; the table of AutoAttack is looked for in the same run.
    publication : Publication
        Title, link, authors, venue.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    UserError
        A rule of the leaderboard is not met; the message names every such rule.
    """
    folder = Path(folder)
    weights, table_path = folder / "student.safetensors", _table_of(folder)
    header = read_header(weights)
    if header.get("kind") != "student":
        raise UserError(f"{folder} holds no exported student; expected results/RUN/export_student/BUDGET")
    if not table_path.exists():
        raise UserError(
            f"rule AutoAttack: there is no {table_path}; the leaderboard lists AutoAttack's accuracy: run the target "
            f"{table_path}"
        )
    table, metadata = read_table(table_path, columns=AUTOATTACK), read_metadata(table_path)
    row = table[table["attack"] == AUTOATTACK_UNION].iloc[0]
    additional = _additional_data(folder, publication)
    broken = broken_rules(header, row, made_from=metadata.get("inputs", {}).get(weights.name), checksum=sha256(weights))
    broken += additional if isinstance(additional, list) else []
    if broken:
        lines = "".join(f"\n  rule {rule}" for rule in broken)
        raise UserError(f"{folder} does not meet the rules of RobustBench:{lines}")
    facts = _facts(header, row, publication, bool(additional), sha256(folder / "student.pt2"))
    paths = [folder / name for name in WRITTEN]
    write_json(paths[0], entry(header, row, publication, bool(additional)))
    write_text(paths[1], TEXT.format(**facts))
    write_text(paths[2], inspect.getsource(plain))
    return paths


def _table_of(folder: Path) -> Path:
    """Where the same run keeps AutoAttack's outcomes of the student in this folder."""
    return folder.parent.parent / "autoattack_student" / folder.name / "table.parquet"


def broken_rules(header: Mapping[str, Any], row: pd.Series, *, made_from: str | None, checksum: str) -> list[str]:
    """The leaderboard's rules that a student does not meet, each with what was found and what is expected.

    Parameters
    ----------
    header : mapping
        Header of the student's weights.
    row : Series
        AutoAttack's row of all attacks.
    made_from, checksum : str
        Checksum of the weights that AutoAttack attacked, and of those in the folder.
    """
    dataset, threat, found = header["dataset"], header["threat"], []
    if made_from != checksum:
        found.append("weights: AutoAttack attacked another student.safetensors; run autoattack_student again")
    if dataset not in DATA:
        found.append(f"data: the student was trained on {dataset}; expected prepare_data.source {' or '.join(DATA)}")
    eps = RADII.get((dataset, threat["norm"]))
    if dataset in DATA and eps is None:
        found.append(f"threat: there is no leaderboard of {dataset} with norm {threat['norm']}")
    elif eps is not None and abs(threat["eps"] - eps) > 1e-12:
        found.append(f"eps: {255 * threat['eps']:.6g}/255; expected exactly {255 * eps:.6g}/255 ({threat['norm']})")
    if row["num_images"] != TEST_IMAGES:
        found.append(
            f"images: AutoAttack on {row['num_images']:,} test images; expected all {TEST_IMAGES:,}: leave out "
            "autoattack_student.num_images"
        )
    if row["left_out"]:
        found.append(
            f"attacks: AutoAttack did not attack {row['left_out']} images; set autoattack_student.attack_all: true"
        )
    if not str(row["version"]).startswith("standard"):
        found.append(f"version: {row['version']}; expected the standard version of AutoAttack")
    if row["warnings"]:
        found.append(f"gradients, logits, determinism: AutoAttack warns: {row['warnings']}")
    return found


def _additional_data(folder: Path, publication: Publication) -> bool | list[str]:
    """Whether more images than the data set's were used; a broken rule where only the user can say."""
    if publication.additional_data is not None:
        return publication.additional_data
    manifest = folder.parent.parent / "prepare_data" / "manifest.json"
    if manifest.exists() and "additional" in json.loads(manifest.read_text(encoding="utf-8"))["splits"]["train"]:
        return True
    teacher = folder.parent.parent / "train_teacher" / "teacher.safetensors"
    source = None
    if teacher.exists():
        settings = read_header(teacher).get("provenance", {}).get("settings", {})
        source = settings.get("train_teacher", {}).get("source")
    if source == "train":
        return False
    found = "is not there" if source is None else "was not trained in this run"
    return [f"additional data: the teacher {found}; give --additional-data yes or no"]


def entry(header: Mapping[str, Any], row: pd.Series, publication: Publication, additional: bool) -> dict[str, Any]:
    """The leaderboard's JSON of a model."""
    return {
        "link": publication.link,
        "name": publication.title,
        "authors": publication.authors,
        "additional_data": additional,
        "number_forward_passes": 1,
        "dataset": header["dataset"],
        "venue": publication.venue,
        "architecture": _architecture(header),
        "eps": "8/255" if header["threat"]["norm"] == "linf" else f"{header['threat']['eps']:g}",
        "clean_acc": f"{100 * row['clean_acc']:.2f}",
        "reported": f"{100 * row['robust_acc']:.2f}",
        "autoattack_acc": f"{100 * row['robust_acc']:.2f}",
        "unreliable": False,
    }


def _architecture(header: Mapping[str, Any]) -> str:
    """Name of the space and of the arch, with its size."""
    return f"{header['space']['name']} subnet {header['arch_id']} ({header['macs'] / 1e6:.1f} M MACs)"


def _facts(
    header: Mapping[str, Any], row: pd.Series, publication: Publication, additional: bool, checksum: str
) -> dict[str, Any]:
    """Values of the text."""
    listed = entry(header, row, publication, additional)
    return {
        "name": header["name"],
        "paper": publication.title,
        "link": publication.link,
        "authors": publication.authors,
        "venue": publication.venue,
        "dataset": DATA[header["dataset"]],
        "norm": NORMS[header["threat"]["norm"]],
        "eps": listed["eps"],
        "architecture": listed["architecture"],
        "params": header["params"],
        "macs": header["macs"],
        "clean": percent_interval(row, "clean_acc"),
        "robust": percent_interval(row, "robust_acc"),
        "version": f"AutoAttack {row['version']}",
        "num_images": int(row["num_images"]),
        "additional": "yes" if additional else "no: training images of the data set alone",
        "license": header["license"],
        "checksum": checksum,
    }
