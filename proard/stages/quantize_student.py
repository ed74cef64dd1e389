"""Quantise an exported student to int8, and measure what that costs: files of the export -> int8 ONNX file, table."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from proard.artifacts import QUANTISED, ArtifactError, atomic_path, read_header, read_table, write_table, write_text
from proard.data import ImageSet, to_float
from proard.evaluation import measure, work_of
from proard.evaluation.deployed import (
    OnDevice,
    Predict,
    accept_twin,
    agreement,
    attack_deployed,
    deployed_rows,
    last_iterates,
    logits_of,
    probe_of,
    worst_case,
    zero_gradients,
)
from proard.evaluation.meter import Measured
from proard.export import load_student
from proard.export.formats import INPUT, OUTPUT
from proard.export.int8 import (
    FIRST,
    OTHER_RANGES,
    Recipe,
    fold_normalisation,
    operators,
    quantise,
    ranges_of,
    with_weights,
)
from proard.export.int8_card import int8_block
from proard.export.int8_training import FakeQuantised, train_int8
from proard.export.parity import latency, open_session
from proard.export.twin import Twin
from proard.host import processor
from proard.nets import FixedNet, FoldedNet, fold, load_static
from proard.space import one_pass, read_space
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import conditions_of, load_images


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="quantize_student",
        reads=["onnx", "weights", "teacher", "train", "val", "test", "budget"],
        writes=["int8", "table", "card"],
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Quantisation(job, Path(folder))
        kept, on_val = work.choose()
        rows = on_val + work.measured_on_test(kept)
        with atomic_path(job.files.int8) as temporary:
            shutil.copyfile(kept.path, temporary)
    files = job.files
    inputs = (files.onnx, files.weights, files.teacher, files.train, files.val, files.test)
    name, flags = processor()
    machine = {"runtime": f"onnxruntime {onnxruntime.__version__}", "cpu": name, "cpu_flags": list(flags)}
    write_table(files.table, rows, QUANTISED, job.provenance(*inputs), machine=machine)
    write_text(files.card, int8_block(read_table(files.table)))
    worst = rows[-1]
    print(
        f"{files.budget}: int8 ({kept.recipe.name}) on test clean {worst['clean_acc']:.1%} "
        f"({100 * worst['clean_difference']:+.1f} points), robust {worst['robust_acc']:.1%} "
        f"({100 * worst['difference']:+.1f} points, {100 * worst['difference_low']:+.1f} to "
        f"{100 * worst['difference_high']:+.1f}; {worst['lost']} images lost, {worst['gained']} gained); "
        f"twin and runtime agree on {worst['agreement_clean']:.2%}, attacked {worst['agreement_adversarial']:.2%}"
    )
    print(f"  {files.int8} ({worst['bytes'] / 1e3:,.0f} kB)")
    job.record_costs()


@dataclass(frozen=True)
class Variant:
    """One int8 file before one of several is kept.

    Attributes
    ----------
    model : ModelProto
        The float model that the file was made of.
    score : (float, float)
        Paired difference of robust accuracy to float32, and clean accuracy, both on val; the highest is best.
    """

    recipe: Recipe
    path: Path
    model: onnx.ModelProto
    score: tuple[float, float]


class Quantisation:
    """One student's int8 variants and their measurements.

    Parameters
    ----------
    job : Job
        Files and settings.
    folder : Path
        Of the variants' files.

    Raises
    ------
    ArtifactError
        The weights are of another budget.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder, self.settings = job, folder, job.config.quantize_student
        self.conditions = conditions_of(job)
        self.attacks = [
            attack.model_copy(update={"dtype": "float32"})
            for attack in self.settings.attacks or job.config.verify_front.attacks
        ]
        header = read_header(job.files.weights)
        if header.get("budget") != job.files.budget:
            raise ArtifactError(f"{job.files.weights} is of {header.get('budget')}, not of {job.files.budget}")
        self.space = read_space(header["space"])
        self.arch = self.space.read_arch(header["arch"])
        self.macs = self.space.spec(self.arch).macs
        self.student = load_student(job.files.weights).to(job.device)
        self.model = fold_normalisation(onnx.load(job.files.onnx))
        images = load_images(job, "train", self.settings.calibration_images)
        self.calibration = to_float(images.images).cpu().contiguous().numpy()
        job.ledger.tally.spent += len(images) * one_pass(self.macs)

    def runtime(self, path: Path) -> Predict:
        """A file's logits on its runtime, as a function of tensors on any device."""
        session = open_session(path, threads=self.job.threads)

        def predict(images: Tensor) -> Tensor:
            (logits,) = session.run([OUTPUT], {INPUT: images.detach().cpu().contiguous().numpy()})
            return torch.from_numpy(logits).to(images.device)

        return predict

    def choose(self) -> tuple[Variant, list[dict[str, Any]]]:
        """The variant that keeps most robust accuracy on val, and the rows of all that were tried there."""
        val = load_images(self.job, "val", self.settings.num_val_images)
        in_float = self.worst_case(self.student, val)
        rows, tried = self.rows(in_float, val), list[Variant]()

        def attempt(recipe: Recipe, model: onnx.ModelProto, **options: Any) -> None:
            path = self.folder / f"{recipe.name}.onnx"
            quantise(model, path, self.calibration, recipe, **options)
            found = self.worst_case(OnDevice(self.runtime(path), Twin(path).to(self.job.device)), val)
            rows.extend(self.rows(found, val, against=in_float, variant=recipe.name))
            tried.append(Variant(recipe, path, model, (rows[-1]["difference"], rows[-1]["clean_acc"])))

        attempt(FIRST, self.model)
        for repair in self.settings.repairs:
            best = max(tried, key=lambda each: each.score)
            if best.score[0] >= -self.settings.max_drop:
                break
            if repair == "range":
                for recipe in OTHER_RANGES:
                    attempt(recipe, self.model)
            elif repair == "ends":
                attempt(best.recipe.with_float_ends(), best.model)
            else:
                attempt(best.recipe.with_training(), self.trained(best), ranges=ranges_of(best.path))
        kept = max(tried, key=lambda each: each.score)
        for row in rows[1:]:
            row["chosen"] = row["variant"] == kept.recipe.name
        return kept, rows

    def trained(self, variant: Variant) -> onnx.ModelProto:
        """The float model with weights trained further as the variant's file rounds them."""
        net = FakeQuantised(variant.path, variant.model, variant.recipe, device=self.job.device)
        _, work = train_int8(
            net,
            self.student,
            load_images(self.job, "train"),
            settings=self.settings.training,
            threat=self.conditions.threat,
            augment=self.job.config.train_phase.phases[-1].augment,
            macs=self.macs,
            seed=self.job.seed,
            label=f"{self.job.files.budget} int8 training",
        )
        self.job.ledger.trained += work
        return with_weights(variant.model, net.arrays())

    def worst_case(self, net: Predict, images: ImageSet) -> Measured:
        """A network under the measuring attacks, of which only the worst case is kept."""
        found = measure(net, images, self.attacks, self.conditions)
        self.job.ledger.tally.spent += work_of(found.values(), self.macs)
        return {"worst": worst_case(found)}

    def measured_on_test(self, kept: Variant) -> list[dict[str, Any]]:
        """Rows of float32 and int8 on test; the last is int8's union of all attacks.

        Raises
        ------
        UserError
            Twin and runtime disagree on too many images.
        """
        test, size = load_images(self.job, "test", self.settings.num_images), self.conditions.measurement.batch_size
        pixels, probe = to_float(test.images), probe_of(self.attacks)
        runtime, twin = self.runtime(kept.path), Twin(kept.path).to(self.job.device)
        adv = last_iterates(twin, test, probe, self.conditions)
        on_clean = agreement(logits_of(twin, pixels, size), logits := logits_of(runtime, pixels, size))
        on_adv = agreement(logits_of(twin, adv, size), logits_of(runtime, adv, size))
        accept_twin(
            Path(self.job.files.int8).name,
            {"clean": on_clean, "attacked": on_adv},
            least=self.settings.min_agreement,
            setting="quantize_student",
            runtime=f"onnxruntime {onnxruntime.__version__}",
        )
        teacher = fold(load_static(self.job.files.teacher, kind="teacher")[0]).to(self.job.device)
        in_float = self.attacked(self.student, test, ("float32", self.student), ("int8", twin), teacher)
        in_int8 = self.attacked(runtime, test, ("int8", twin), ("float32", self.student), teacher)
        checked = (2 * probe.num_steps + 6) * len(test)
        self.job.ledger.tally.spent += checked * one_pass(self.macs)
        milliseconds = latencies((Path(self.job.files.onnx), kept.path), pixels[:1].cpu().numpy())
        facts = {
            "chosen": True,
            "agreement_clean": on_clean.top1,
            "agreement_adversarial": on_adv.top1,
            "max_logit_difference": max(on_clean.max_difference, on_adv.max_difference),
            "agreement_float": agreement(logits, logits_of(self.student, pixels, size)).top1,
            "zero_gradients": zero_gradients(twin, pixels, test.labels, size),
            "operators": json.dumps(operators(kept.path)),
            "bytes": kept.path.stat().st_size,
            "latency_ms": milliseconds[1],
        }
        of_float = {"bytes": Path(self.job.files.onnx).stat().st_size, "latency_ms": milliseconds[0]}
        rows = [{**row, **of_float} for row in self.rows(in_float, test)]
        return rows + [{**row, **facts} for row in self.rows(in_int8, test, against=in_float, variant=kept.recipe.name)]

    def attacked(
        self,
        runtime: Predict,
        images: ImageSet,
        white_box: tuple[str, Predict],
        other: tuple[str, Predict],
        teacher: FoldedNet | FixedNet,
    ) -> Measured:
        """One precision under every attack; `other` is the stand-in of the other precision."""
        transfers = {"transfer": other, "from_teacher": ("teacher", teacher)}
        queries = self.settings.queries
        found = attack_deployed(
            runtime, images, self.attacks, self.conditions, white_box=white_box, transfers=transfers, queries=queries
        )
        for name, entry in found.items():
            if name not in ("worst", "union"):
                macs = teacher.spec.macs if name == "from_teacher" else self.macs
                self.job.ledger.tally.spent += work_of([entry], macs)
        return found

    def rows(
        self, found: Measured, images: ImageSet, *, against: Measured | None = None, variant: str | None = None
    ) -> list[dict[str, Any]]:
        """Measurements as rows; those of int8 are paired with float32's of the same attack on the same images."""
        name, flags = processor()
        files = self.job.files
        common = {
            "budget": files.budget,
            "file": Path(files.onnx if variant is None else files.int8).name,
            "precision": "float32" if variant is None else "int8",
            "variant": variant,
            "runtime": f"torch {torch.__version__}" if variant is None else f"onnxruntime {onnxruntime.__version__}",
            "cpu": name,
            "cpu_flags": " ".join(flags),
        }
        if variant is not None:
            common |= {"calibration_images": len(self.calibration), "calibration_seed": self.job.seed}
        return deployed_rows(
            found,
            images=images,
            attacks=self.attacks,
            queries=self.settings.queries,
            space=self.space,
            arch=self.arch,
            conditions=self.conditions,
            common=common,
            against=against,
        )


def latencies(paths: Sequence[Path], image: NDArray[np.float32]) -> list[float]:
    """Milliseconds of one image on one thread: of each file the better of two medians, taken in turn."""
    rounds = [[latency(path, image)["median_ms"] for path in paths] for _ in range(2)]
    return [min(times) for times in zip(*rounds, strict=True)]


if __name__ == "__main__":
    run(main)
