"""Export a student to ExecuTorch and measure the programs on its runtime: files of the export -> pte files, table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from proard.artifacts import EXECUTORCH, atomic_path, write_json, write_table
from proard.config import UserError
from proard.data import to_float
from proard.evaluation import work_of
from proard.evaluation.deployed import (
    Agreement,
    accept_twin,
    agreement,
    attack_deployed,
    deployed_rows,
    last_iterates,
    logits_of,
    probe_of,
)
from proard.evaluation.meter import Measured
from proard.export.executorch import Runner, deployable, quantised, require_executorch, save_pte, straight_through
from proard.export.parity import timed
from proard.host import processor
from proard.space import one_pass
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import conditions_of, exported_network, load_images

PRECISIONS = ("float32", "int8")
TOLERANCE = 1e-4  # of a class probability, float32 program against the network


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="executorch_student",
        reads=["weights", "train", "test", "budget"],
        writes=["float", "int8", "parity", "table"],
    )
    require_executorch()
    files = job.files
    with tempfile.TemporaryDirectory() as folder:
        work = Programs(job, Path(folder))
        parity = work.parity()
        rows = work.measured()
        for precision, target in zip(PRECISIONS, (files.float, files.int8), strict=True):
            with atomic_path(target) as temporary:
                temporary.write_bytes(work.paths[precision].read_bytes())
    name, flags = processor()
    machine = {"runtime": runtime_name(), "cpu": name, "cpu_flags": list(flags)}
    inputs = (files.weights, files.train, files.test)
    write_json(files.parity, parity)
    write_table(files.table, rows, EXECUTORCH, job.provenance(*inputs), machine=machine)
    for precision in PRECISIONS:
        last = [row for row in rows if row["precision"] == precision][-1]
        print(
            f"{files.budget}: {precision} on {runtime_name()}: clean {last['clean_acc']:.1%}, robust "
            f"{last['robust_acc']:.1%}; {last['agreement_float']:.2%} of the classes of the float network; "
            f"{last['bytes'] / 1e3:,.0f} kB, {last['latency_ms']:.3g} ms"
        )
    job.record_costs()


def runtime_name() -> str:
    """ExecuTorch and its version."""
    return f"executorch {version('executorch')}, XNNPACK"


class Programs:
    """The two programs of one student, and their measurements.

    Parameters
    ----------
    job : Job
        Files and settings.
    folder : Path
        Where the programs are written before they are checked.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.settings = job, job.config.quantize_student
        self.conditions = conditions_of(job)
        self.attacks = [
            attack.model_copy(update={"dtype": "float32"})
            for attack in self.settings.attacks or job.config.verify_front.attacks
        ]
        self.student = exported_network(job)
        self.macs = self.student.space.spec(self.student.arch).macs
        self.test = load_images(job, "test")
        self.attacked = self.test.first(self.settings.num_images)
        calibration = to_float(load_images(job, "train", self.settings.calibration_images).images).cpu()
        self.num_calibrated = len(calibration)
        graph = deployable(self.student.net)
        graphs = {"float32": graph, "int8": quantised(graph, calibration)}
        self.paths = {"float32": folder / "student.pte", "int8": folder / "student.int8.pte"}
        for precision, path in self.paths.items():
            save_pte(path, graphs[precision])
        self.twins = {"float32": self.student.net, "int8": straight_through(graphs["int8"]).to(job.device)}
        self.runners = {precision: Runner(path, threads=job.threads) for precision, path in self.paths.items()}
        job.ledger.tally.spent += self.num_calibrated * one_pass(self.macs)

    def parity(self) -> dict[str, Any]:
        """Compare the programs with the float network on all test images, and with their twins on attacked ones too.

        Raises
        ------
        UserError
            A program is not its graph.
        """
        pixels, size = to_float(self.test.images), self.conditions.measurement.batch_size
        measured = logits_of(self.student.net, pixels, size)
        found: dict[str, Any] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        for precision, runner in self.runners.items():
            logits = logits_of(runner, pixels, size)
            twin = self.twins[precision]
            adv = last_iterates(twin, self.attacked, probe_of(self.attacks), self.conditions)
            own = agreement(logits, logits_of(twin, pixels, size))
            attacked = agreement(logits_of(runner, adv, size), logits_of(twin, adv, size))
            to_float_net = agreement(logits, measured)
            difference = float((logits.softmax(1) - measured.softmax(1)).abs().max())
            name = self.paths[precision].name
            if precision == "float32":
                is_the_network(name, to_float_net, difference)
            else:
                both, least = {"clean": own, "attacked": attacked}, self.job.config.executorch_student.min_agreement
                accept_twin(name, both, least=least, setting="executorch_student", runtime=runtime_name())
            path, image = self.paths[precision], pixels[:1]
            single = Runner(path, threads=1)
            latency = timed(lambda runner=single, image=image: runner(image))  # type: ignore[misc]
            found[name] = {
                "precision": precision,
                "undelegated_operators": [],  # `save_pte` refuses others
                "top1_agreement": to_float_net.top1,
                "max_softmax_difference": difference,
                "max_logit_difference": to_float_net.max_difference,
                "twin_top1_agreement": own.top1,
                "twin_top1_agreement_attacked": attacked.top1,
                "twin_max_logit_difference": max(own.max_difference, attacked.max_difference),
                "test_accuracy": float((logits.argmax(1) == self.test.labels).double().mean()),
                "bytes": path.stat().st_size,
                "latency": {"runtime": runtime_name(), "threads": 1, "batch_size": 1, **latency},
            }
            self.facts[precision] = {
                "agreement_float": to_float_net.top1,
                "agreement_clean": own.top1,
                "agreement_adversarial": attacked.top1,
                "max_logit_difference": max(own.max_difference, attacked.max_difference),
                "bytes": path.stat().st_size,
                "latency_ms": latency["median_ms"],
            }
        passes = 5 * len(self.test) + 4 * (probe_of(self.attacks).num_steps + 1) * len(self.attacked)
        self.job.ledger.tally.spent += passes * one_pass(self.macs)
        versions = {"torch": torch.__version__, "executorch": version("executorch"), "torchao": version("torchao")}
        return {"passed": True, "num_images": len(self.test), "files": found, "versions": versions}

    def measured(self) -> list[dict[str, Any]]:
        """Rows of both programs under attacks through their twins, and through each other's."""
        rows: list[dict[str, Any]] = []
        in_float: Measured | None = None
        for precision, runner in self.runners.items():
            other = next(name for name in PRECISIONS if name != precision)
            found = attack_deployed(
                runner,
                self.attacked,
                self.attacks,
                self.conditions,
                white_box=(precision, self.twins[precision]),
                transfers={"transfer": (other, self.twins[other])},
                queries=0,
            )
            self.job.ledger.tally.spent += work_of(
                [entry for name, entry in found.items() if name not in ("worst", "union")], self.macs
            )
            rows += self.rows(precision, found, against=in_float)
            in_float = found
        return rows

    def rows(self, precision: str, found: Measured, *, against: Measured | None) -> list[dict[str, Any]]:
        """Measurements as rows; those of int8 are paired with float32's of the same attack on the same images."""
        name, flags = processor()
        common = {"budget": self.job.files.budget, "file": self.paths[precision].name, "precision": precision}
        common |= {"runtime": runtime_name(), "cpu": name, "cpu_flags": " ".join(flags), **self.facts[precision]}
        if precision == "int8":
            common |= {"calibration_images": self.num_calibrated, "calibration_seed": self.job.seed}
        return deployed_rows(
            found,
            images=self.attacked,
            attacks=self.attacks,
            queries=0,
            space=self.student.space,
            arch=self.student.arch,
            conditions=self.conditions,
            common=common,
            against=against,
        )


def is_the_network(name: str, found: Agreement, difference: float) -> None:
    """Refuse a float program that is not the measured network.

    Raises
    ------
    UserError
        By how much a class probability differs, or on how many images the class.
    """
    if not (difference <= TOLERANCE and found.top1 == 1):
        raise UserError(
            f"{name} is not the measured network: it gives the same class on {found.top1:.2%} of the test images, and "
            f"a class probability differs by {difference:.2e}; accepted is {TOLERANCE:g}; "
            f"try another version of executorch (now {version('executorch')})"
        )


if __name__ == "__main__":
    run(main)
