"""Export a budget's student or an experiment's network: rows and weights -> weights, ONNX, pt2, card, parity."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from proard import artifacts
from proard.artifacts import TRAININGS, ArtifactError, read_header, read_metadata, read_table
from proard.config import UserError
from proard.data import ImageSet
from proard.export import (
    TRAINED_ALONE,
    StudentFacts,
    check_parity,
    export_program,
    load_student,
    measured_logits,
    model_card,
    save_onnx,
    save_pt2,
    save_student,
)
from proard.export.usage import hub_config, labels_text
from proard.nets import FixedNet, FoldedNet
from proard.space import Arch, NetArch, NetSpace, Part, one_pass, parse_budget
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import load_images, subnet_meter, trained_network

EXPORTED = {  # files of the folder that is passed on, by flag
    "weights": "student.safetensors",
    "onnx": "student.onnx",
    "pt2": "student.pt2",
    "hub": "config.json",
    "labels": "labels.txt",
    "card": "card.md",
    "parity": "parity.json",
    "checksums": "SHA256SUMS",
}
IN_PARITY = ("budget", "arch_id", "arch", "macs", "params", "flash", "sram", "arena", "device")
COLUMNS = ("arch", "arch_id", "macs", "split", "attack", "num_images", "clean_acc", "budget", "role", "chosen")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="export_student",
        reads=["student", "test", "manifest", "budget"],
        writes=tuple(EXPORTED),
        optional=["supernet", "train", "trained"],
    )
    files, manifest = job.files, read_manifest(job.files.manifest)
    found = of_training(job) if files.trained else of_budget(job, manifest)
    read = (files.student, files.supernet, files.trained, files.train, files.test, files.manifest)
    facts = StudentFacts(
        name=f"{job.config.run} {files.budget}",
        budget=files.budget,
        space=found.space,
        arch=found.arch,
        classes=found.test.classes,
        threat=job.config.threat,
        dataset=manifest["source"],
        license=job.config.export_student.license,
        provenance=job.provenance(*(path for path in read if path)),
        footprint=footprint_of(found),
        device=None if files.trained else read_metadata(files.student).get("settings", {}).get("device"),
        latency_file=latency_file_of(found.rows),
    )
    paths = {name: Path(getattr(files, name)) for name in EXPORTED}
    describe = {**found.describe, "counts": image_counts(manifest)}
    write_files(job, paths, found.net, facts, found.rows, test=found.test, describe=describe)
    job.record_costs()


def image_counts(manifest: dict[str, Any]) -> dict[str, int]:
    """Numbers of images for the card, by split; additional training images have a line of their own."""
    splits = manifest["splits"]
    counts = {split: entry["count"] for split, entry in splits.items()}
    if "additional" in splits["train"]:
        counts[f"additional ({splits['train']['share']:.0%} of every training batch)"] = splits["train"]["additional"]
    return counts


@dataclass(frozen=True)
class Measured:
    """A measured network: its rows, the test images of these, and further facts for the card."""

    net: FoldedNet | FixedNet
    space: NetSpace
    arch: NetArch
    rows: pd.DataFrame
    test: ImageSet
    describe: dict[str, Any]


def of_budget(job: Job, manifest: dict[str, Any]) -> Measured:
    """The student that `select_student` chose for a budget, cut from the supernet.

    Raises
    ------
    UserError
        The supernet or the training images were not given.
    """
    files = job.files
    if not (files.supernet and files.train):
        raise UserError(f"the student of budget {files.budget} is cut from the supernet: give --supernet and --train")
    rows, test = chosen_rows(files.student, files.budget), load_images(job, "test")
    _check_images(files, manifest, test, rows)
    meter = subnet_meter(job, cache=None)
    arch = Arch.from_json(rows["arch"].iloc[0])
    describe = describe_budget(files.student, files.supernet)
    return Measured(meter.student(arch), meter.supernet.space, arch, rows, test, describe)


def footprint_of(found: Measured) -> dict[str, float]:
    """Bytes of weights and of activations, and the predicted latency if the student was selected with a device."""
    if not isinstance(found.net, FoldedNet):
        return {}
    whole = Part.whole(found.net.spec)
    promised = found.rows.get("latency", pd.Series(dtype=float)).dropna()
    latency = {} if promised.empty else {"latency": float(promised.iloc[0])}
    return {"flash": whole.flash, "sram": whole.sram, "arena": whole.arena, **latency}


def latency_file_of(rows: pd.DataFrame) -> str:
    """The file whose latency was predicted; tables of earlier versions do not name it."""
    named = rows.get("latency_file", pd.Series(dtype=object)).dropna()
    return "student.onnx" if named.empty else str(named.iloc[0])


def of_training(job: Job) -> Measured:
    """The network that a training of the experiment made; its rows are those at the threat's radius.

    Raises
    ------
    ArtifactError
        The outcomes are of another training.
    """
    files, table = job.files, read_table(job.files.student, columns=TRAININGS)
    net, space, arch = trained_network(job, files.trained, trains=table["trains"].iloc[0])
    rows = trained_rows(files.student, files.budget, arch.arch_id, job.config.threat.eps)
    test = load_images(job, "test", int(rows.loc[rows["split"] == "test", "num_images"].iloc[0]))
    return Measured(net, space, arch, rows, test, describe_training(files.student, files.trained))


def trained_rows(path: str, name: str, arch_id: str, eps: float) -> pd.DataFrame:
    """Rows that measure a training's network, at the threat's radius where the table has it.

    Raises
    ------
    ArtifactError
        The outcomes are of another training.
    """
    rows = read_table(path, columns=TRAININGS)
    rows = rows[rows["role"] != "subnet"]
    if set(rows["training"]) != {name} or set(rows["arch_id"]) != {arch_id}:
        raise ArtifactError(f"{path} does not measure {name} in its trained weights; rerun measure_experiment")
    at_threat = rows[(rows["eps"] - eps).abs() < 1e-12]
    return (rows if at_threat.empty else at_threat).assign(role="trained")


def describe_training(path: str, weights: str) -> dict[str, Any]:
    """What the card of a training's network says beside its rows."""
    measure = read_metadata(path)["settings"]["experiment"]["measure"]
    return {"attacks": measure["attacks"], "supernet": read_header(weights), "origin": TRAINED_ALONE}


def describe_budget(path: str, supernet: str) -> dict[str, Any]:
    """What the card of a budget's student says beside its rows."""
    return {"attacks": _attacks(path), "supernet": read_header(supernet)}


def write_files(
    job: Job,
    paths: dict[str, Path],
    measured: FoldedNet | FixedNet,
    facts: StudentFacts,
    rows: pd.DataFrame,
    *,
    test: ImageSet,
    describe: dict[str, Any],
) -> None:
    """Write a measured network in every format, checked against itself, with its card and checksums.

    `rows` measure it, those of `test` among them; `describe` holds what `model_card` is told beside them.
    """
    settings, batch_size = job.config.export_student, job.config.measurement.batch_size
    alone = ~rows["attack"].isin(["worst", "own"])
    reference = rows[(rows["split"] == "test") & alone].iloc[0]
    clean_acc = float(reference["clean_acc"])
    logits = measured_logits(measured, test, row_clean_acc=clean_acc, batch_size=batch_size)
    try:
        save_student(paths["weights"], measured, facts)
        program = export_program(load_student(paths["weights"]))
        save_pt2(paths["pt2"], program, facts)
        save_onnx(paths["onnx"], program, facts, opset=settings.opset)
        checked = check_parity(
            logits,
            test,
            weights=paths["weights"],
            onnx=paths["onnx"],
            pt2=paths["pt2"],
            row_clean_acc=clean_acc,
            eps=job.config.threat.eps,
            norm=job.config.threat.norm,
            step_size=float(reference["step_size"]),
            num_steps=int(reference["num_steps"]),
            tolerance=settings.tolerance,
            batch_size=batch_size,
            seed=job.seed,
            threads=torch.get_num_threads(),
        )
    except BaseException:
        for name in ("weights", "onnx", "pt2"):  # nothing unchecked stays behind
            paths[name].unlink(missing_ok=True)
        raise
    passes = len(test) + checked["image_passes"]
    job.ledger.tally.spent += passes * one_pass(measured.spec.macs)
    header = facts.to_header()
    identity = {key: header[key] for key in IN_PARITY if key in header}
    if "latency" in header:
        identity["predicted_latency"] = header["latency"]
    artifacts.write_json(paths["parity"], {**identity, **checked, "provenance": json.loads(facts.provenance.to_json())})
    artifacts.write_text(paths["card"], model_card(facts, rows, parity=checked, opset=settings.opset, **describe))
    artifacts.write_json(paths["hub"], hub_config(facts))
    artifacts.write_text(paths["labels"], labels_text(facts))
    artifacts.write_text(paths["checksums"], checksum_list(paths))
    print(_summary(facts, checked, paths))


def chosen_rows(path: str | Path, budget: str) -> pd.DataFrame:
    """Rows that measure the chosen student of this budget, under every attack and on both splits.

    Raises
    ------
    ArtifactError
        The table is of another budget, or does not hold exactly one choice with rows on test.
    UserError
        The choice costs more than the budget allows.
    """
    table = read_table(path, columns=COLUMNS)
    limit = parse_budget(budget)
    found = sorted(set(table["budget"]))
    if found != [limit.text]:
        raise ArtifactError(
            f"{path} is of budget {', '.join(found) or '(empty)'}, not {limit.text}; rerun select_student"
        )
    rows = table[table["chosen"].astype(bool)]
    archs = rows["arch"].nunique()
    on_test = (rows["role"] == "choice") & (rows["split"] == "test") & (rows["attack"] != "worst")
    if archs != 1 or not on_test.any():
        raise ArtifactError(
            f"{path} holds {archs} chosen archs and {int(on_test.sum())} measurements of the choice on test; "
            "expected one arch with at least one; rerun select_student"
        )
    for column, most in limit.limits.items():
        cost = float(rows[column].iloc[0])
        if cost > most:
            found_cost = f"{cost:,.0f}" if column != "latency" else f"{cost:.4g} ms"
            raise UserError(f"{path}: the chosen student has {column} {found_cost}, above budget {budget}")
    return rows


def read_manifest(path: str) -> dict[str, Any]:
    """Facts about the images, from the manifest."""
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("source", "classes", "splits")}
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; rerun prepare_data") from None
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is no manifest of prepare_data ({error}); rerun prepare_data") from None


def _check_images(files: Any, manifest: dict[str, Any], test: ImageSet, rows: pd.DataFrame) -> None:
    """Refuse test images that are not the manifest's or not those of the selected rows."""
    expected = manifest["splits"]["test"]["checksum"]
    if test.checksum != expected:
        raise ArtifactError(
            f"{files.test} has checksum {test.checksum[:12]}, {files.manifest} says {expected[:12]}; rerun prepare_data"
        )
    measured = set(rows.loc[rows["split"] == "test", "num_images"].astype(int))
    if measured != {len(test)}:
        raise ArtifactError(
            f"{files.student} was measured on {sorted(measured)} test images, {files.test} holds {len(test)}; "
            "rerun select_student"
        )


def _attacks(path: str) -> list[dict[str, Any]]:
    """Settings of the attacks that the selection ran, from the table's provenance."""
    sections = read_metadata(path).get("settings", {})
    selection = sections.get("select_student", {}).get("attack")
    return [*sections.get("verify_front", {}).get("attacks", []), *([selection] if selection else [])]


def checksum_list(paths: dict[str, Path]) -> str:
    """Lines for `sha256sum -c`, run in the folder of the list."""
    folder = paths["checksums"].parent
    others = [path for name, path in paths.items() if name != "checksums"]
    return "".join(f"{artifacts.sha256(path)}  {os.path.relpath(path, folder)}\n" for path in others)


def _summary(facts: StudentFacts, checked: dict[str, Any], paths: dict[str, Path]) -> str:
    """Summary line for the terminal."""
    spec, sizes = facts.space.spec(facts.arch), checked["bytes"]
    by_onnx, by_pt2 = checked["onnx_max_softmax_difference"], checked["pt2_max_softmax_difference"]
    attacked, accuracy = checked["adversarial"]["onnx_max_softmax_difference"], checked["onnx_test_accuracy"]
    lines = [
        f"{facts.name}: arch {facts.arch.arch_id}, {spec.macs / 1e6:.2f} M MACs, {spec.params / 1e6:.3f} M parameters",
        f"  {checked['num_images']:,} test images: accuracy {accuracy:.2%} in ONNX, PyTorch and student.parquet",
        f"  softmax within {by_onnx:.1e} (ONNX), {attacked:.1e} (ONNX, attacked images), {by_pt2:.1e} (pt2)",
        f"  one image on one CPU thread: {checked['latency']['median_ms']:.2f} ms",
    ]
    lines += [f"  {paths[name]} ({sizes[paths[name].name] / 1e3:,.0f} kB)" for name in ("weights", "onnx", "pt2")]
    return "\n".join([*lines, *(f"  {paths[name]}" for name in ("card", "parity", "checksums"))])


if __name__ == "__main__":
    run(main)
