"""A small synthetic run on disk, in the layout of results/RUN, for the tests of code that reads tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from proard import artifacts
from proard.artifacts import FRONT, HISTORY, MEASURED, PREDICTED, QUANTISED, STUDENT, Provenance
from proard.config import RunConfig, job_settings, load
from proard.predictor.quality import HELD_OUT, QUALITY
from proard.search import HISTORY as SEARCH_HISTORY

ATTACKS = {"pgd20": 0.0, "pgd50x2": 0.004, "cw50x2": 0.015, "worst": 0.018}
STEPS = {"pgd20": (20, 1), "pgd50x2": (50, 2), "cw50x2": (50, 2), "worst": (None, None)}
BUDGETS = ("macs=2M", "macs=4M", "macs=8M", "macs=12M", "params=1M")
CONTROL = {"arch_id": "control", "macs": 17_900_000, "params": 1_300_000}


class SyntheticRun:
    """Writes every table of a run below `folder`, and lists the report stage's flags for them."""

    def __init__(self, folder: Path, *, num_archs: int = 40, **sections: Any) -> None:
        self.folder = folder / "results" / "demo"
        self.rng = np.random.default_rng(0)
        self.num_archs = num_archs
        self.config: RunConfig = load(
            {"run": "demo", "seed": 3, "space": "resnet_micro", "prepare_data": {"source": "cifar10"}, **sections}
        )
        self.students: dict[str, dict[str, Any]] = {}
        self._write_manifest()
        self._write_trainings()
        self._write_table()
        self._write_searches()
        for budget in BUDGETS:
            self._write_student(budget)
        self._write_benchmarks()

    def path(self, *parts: str) -> Path:
        """A file of the run."""
        return self.folder.joinpath(*parts)

    def provenance(self, stage: str) -> Provenance:
        """Provenance as the stage would write it."""
        phase = self.config.train_phase.phases[0].name if stage == "train_phase" else None
        sections = json.loads(job_settings(self.config, stage, phase=phase))
        return Provenance("demo", stage, sections, 3, {"input.parquet": "0" * 64})

    def write(self, stage: str, name: str, rows: list[dict[str, Any]], columns: dict[str, Any], *folders: str) -> None:
        """One table of a stage."""
        artifacts.write_table(self.path(stage, *folders, name), rows, columns, self.provenance(stage))

    def arch(self, macs: float | None = None) -> dict[str, Any]:
        """An arch with costs and a true quality."""
        macs = float(np.exp(self.rng.uniform(np.log(1.6e6), np.log(18e6)))) if macs is None else macs
        name = f"{self.rng.integers(16**12):012x}"
        arch = {"arch_id": name, "genotype": [0, 1, 2, 1], "arch": '{"depth":[0,1]}', "macs": round(macs)}
        size = np.log(macs / 1.6e6) / np.log(18e6 / 1.6e6)
        luck = self.rng.normal(0, 0.012)
        arch["params"] = round(macs / 14)
        return {"identity": arch, "clean": 0.50 + 0.17 * size**0.8 + luck, "robust": 0.28 + 0.10 * size**0.8 + luck / 2}

    def measured(self, arch: dict[str, Any], split: str, attack: str, *, images: int = 1000) -> dict[str, Any]:
        """A row of MEASURED."""
        steps, restarts = STEPS[attack]
        row = {
            **arch["identity"], "split": split, "attack": attack, "norm": "linf", "eps": 8 / 255, "num_steps": steps,
            "step_size": None if steps is None else 2 / 255, "restarts": restarts, "accounting": "any_iterate",
            "bn_mode": "running", "num_images": images, "seconds": 1.5, "seed": 3,
        }  # fmt: skip
        for column, truth in (("clean_acc", arch["clean"]), ("robust_acc", arch["robust"] - ATTACKS[attack])):
            hits = round(images * min(max(truth, 0), 1))
            row[column] = hits / images
            row[f"{column}_low"], row[f"{column}_high"] = artifacts.wilson(hits, images)
        return row

    def _write_manifest(self) -> None:
        """Manifest of prepare_data."""
        counts = {"train": 45_000, "val": 5_000, "test": 5_000}
        splits = {name: {"count": count, "image_shape": [32, 32, 3]} for name, count in counts.items()}
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        manifest = {"run": "demo", "source": "cifar10", "classes": classes, "splits": splits, "version": "0.1.0"}
        artifacts.write_json(self.path("prepare_data", "manifest.json"), manifest)

    def _write_trainings(self) -> None:
        """Histories of teacher, control and two phases, and the control's table."""
        for stage, phase, archs, top in (
            ("train_teacher", "teacher", ["largest"], 0.40),
            ("train_control", "control", ["largest"], 0.001),
            ("train_phase", "width", ["largest", "middle", "smallest"], 0.39),
            ("train_phase", "depth", ["largest", "middle", "smallest"], 0.39),
        ):
            rows = []
            for epoch in range(1, 13):
                common = {"phase": phase, "epoch": epoch, "step": 10 * epoch, "loss": 2.2 / epoch**0.4, "seed": 3}
                for rank, arch in enumerate(archs if epoch % 2 == 0 else [""]):
                    done = 1 - np.exp(-epoch / 4)
                    robust, clean = (top - 0.03 * rank) * done, (0.66 - 0.05 * rank) * done
                    validated = {"val_clean_acc": clean, "val_robust_acc": robust, "val_num_images": 500, "macs": 10**7}
                    rows.append({**common, "arch": arch, "best": epoch == 10, **(validated if arch else {})})
            self.write(stage, "history.parquet", rows, HISTORY, *([phase] if stage == "train_phase" else []))
        control = {"identity": CONTROL, "clean": 0.87, "robust": 0.02}
        rows = [self.measured(control, split, attack) for split in ("val", "test") for attack in ATTACKS]
        self.write("train_control", "table.parquet", rows, MEASURED)

    def _write_table(self) -> None:
        """The predictor's table, its quality and its held-out archs."""
        costs = [1.6e6, 18e6, *[None] * (self.num_archs - 2)]
        rows = [self.measured(self.arch(cost), "val", "pgd20") for cost in costs]
        self.write("merge_table", "table.parquet", rows, MEASURED)
        self.rows = rows
        quality = [
            {
                "model": model, "chosen": model == "gp", "target": target, "num_train": 160, "num_held_out": 40,
                "cv_tau": tau - 0.01, "kendall_tau": tau, "kendall_tau_low": tau - 0.1, "kendall_tau_high": tau + 0.06,
                "spearman": tau + 0.1, "r2": 0.8, "rmse": 0.008, "top_k_regret": 0.002, "noise_ceiling": 0.74,
                "noise_ceiling_low": 0.62, "noise_ceiling_high": 0.83, "tau_over_ceiling": tau / 0.74, "seed": 3,
            }
            for target in ("clean_acc", "robust_acc") for model, tau in (("ridge", 0.66), ("gp", 0.71), ("mlp", 0.58))
        ]  # fmt: skip
        self.write("fit_predictor", "quality.parquet", quality, QUALITY)
        held_out = []
        for row in rows[-40:]:
            kept = {name: row[name] for name in ("arch_id", "macs", "clean_acc", "robust_acc")}
            for name in ("clean_acc", "robust_acc"):
                kept[f"predicted_{name}"] = row[name] + self.rng.normal(0, 0.006)
            held_out.append({**kept, "model": "gp", "seed": 3})
        self.write("fit_predictor", "held_out.parquet", held_out, HELD_OUT)

    def _write_searches(self) -> None:
        """Archive, front, history and the verified archs."""
        verified, front = [], []
        for search, gain, archs in (("nsga2", 0.014, 8), ("random", 0.004, 8), ("uniform", 0.002, 3)):
            for macs in np.geomspace(1.7e6, 17.5e6, archs):
                arch = self.arch(macs)
                arch["clean"], arch["robust"] = arch["clean"] + gain, arch["robust"] + gain
                predicted = {
                    "predicted_clean_acc": arch["clean"] + 0.003,
                    "predicted_robust_acc": arch["robust"] + 0.004,
                }
                front.append({**arch["identity"], **predicted, "found_by": search, "seed": 3})
                for split in ("val", "test"):
                    rows = [self.measured(arch, split, attack, images=5000) for attack in ATTACKS]
                    verified += [{**row, **predicted, "found_by": search} for row in rows]
        self.write("search_front", "front.parquet", front, PREDICTED)
        self.write("search_front", "archive.parquet", front, PREDICTED)
        self.write("verify_front", "front.parquet", verified, FRONT)
        history = [
            {
                "search": search, "generation": generation, "evaluations": 100 * generation, "seed": 3,
                "hypervolume": top * (1 - 0.3 / generation), "exhaustive_hypervolume": 0.79,
            }
            for search, top in (("nsga2", 0.78), ("random", 0.7)) for generation in range(1, 21)
        ]  # fmt: skip
        self.write("search_front", "history.parquet", history, SEARCH_HISTORY)

    def _write_student(self, budget: str) -> None:
        """Selection and parity of one budget."""
        limit = {"params=1M": 14e6}.get(budget) or float(budget[5:-1]) * 1e6
        archs = [self.arch(limit * share) for share in (0.97, 0.9, 0.85)]
        choice = max(archs, key=lambda arch: arch["robust"])
        rows = []
        for arch in archs:
            asked = {
                "predicted_clean_acc": arch["clean"] + 0.005, "predicted_robust_acc": arch["robust"] + 0.006,
                "budget": budget, "found_by": "nsga2", "chosen": arch is choice,
                "sram": 40_960, "arena": 57_344, "latency": 0.375,
            }  # fmt: skip
            rows.append({**self.measured(arch, "val", "pgd20"), **asked, "role": "candidate"})
            if arch is choice:
                for split in ("val", "test"):
                    rows += [
                        {**self.measured(arch, split, attack, images=5000), **asked, "role": "choice"}
                        for attack in ATTACKS
                    ]
        final = next(row for row in rows if row["split"] == "test" and row["attack"] == "worst")
        self.students[budget] = final
        self.write("select_student", "student.parquet", rows, STUDENT, budget)
        pairs = []
        for precision, less, size in (("float32", 0.0, 400_000), ("int8", 0.008, 110_000)):
            row = {**final, "attack": "union", "robust_acc": final["robust_acc"] - less, "precision": precision}
            row = {name: value for name, value in row.items() if name in QUANTISED}
            row |= {
                "budget": budget,
                "bytes": size,
                "latency_ms": 0.4 if precision == "float32" else 0.25,
                "runtime": "onnxruntime 1.30",
                "cpu": "a CPU",
            }
            row["file"] = "student.onnx" if precision == "float32" else "student.int8.onnx"
            if precision == "int8":
                row |= {"variant": "reduced", "difference": -less, "difference_low": -0.02, "difference_high": 0.001}
                row |= {
                    "lost": 50,
                    "gained": 10,
                    "agreement_clean": 1.0,
                    "agreement_adversarial": 0.998,
                    "cpu_flags": "avx2",
                }
            pairs.append(row)
        self.write("quantize_student", "table.parquet", pairs, QUANTISED, budget)
        parity = {
            "budget": budget, "macs": final["macs"], "passed": True, "onnx_max_softmax_difference": 3e-7,
            "onnx_top1_agreement": 1.0, "onnx_test_accuracy": final["clean_acc"],
            "torch_test_accuracy": final["clean_acc"], "num_images": 5000,
        }  # fmt: skip
        artifacts.write_json(self.path("export_student", budget, "parity.json"), parity)

    def _write_benchmarks(self) -> None:
        """Snakemake's records: one job, several jobs, and one too short to sample memory."""
        jobs = {"prepare_data": "0.5\t-", "train_teacher": "820.25\t1450.2", "train_control": "410\t1400"}
        jobs |= {"train_phase/width": "1250.5\t1610", "train_phase/depth": "1310\t1620", "fit_predictor": "22\t300"}
        jobs |= {f"evaluate_archs/{first:04d}-{first + 49:04d}": "310.125\t900" for first in (0, 50, 100)}
        for job, values in jobs.items():
            text = f"s\tmax_rss\n{values}\n"
            artifacts.write_text(self.path("benchmarks", f"{job}.tsv"), text)

    def flags(self, *, without: tuple[str, ...] = ()) -> list[str]:
        """Command line of the report stage; `without` names flags to leave out."""
        single = {
            "manifest": "prepare_data/manifest.json", "teacher-history": "train_teacher/history.parquet",
            "control-table": "train_control/table.parquet", "control-history": "train_control/history.parquet",
            "table": "merge_table/table.parquet", "quality": "fit_predictor/quality.parquet",
            "held-out": "fit_predictor/held_out.parquet", "archive": "search_front/archive.parquet",
            "front": "search_front/front.parquet", "search-history": "search_front/history.parquet",
            "verified": "verify_front/front.parquet", "benchmarks": "benchmarks", "html": "report/report.html",
            "front-figure": "report/front.svg", "training-figure": "report/training.svg",
            "predictor-figure": "report/predictor.svg", "search-figure": "report/hypervolume.svg",
            "costs-figure": "report/costs.svg",
        }  # fmt: skip
        several = {
            "phase-histories": [f"train_phase/{phase}/history.parquet" for phase in ("width", "depth")],
            "students": [f"select_student/{budget}/student.parquet" for budget in BUDGETS],
            "quantised": [f"quantize_student/{budget}/table.parquet" for budget in BUDGETS],
            "cards": [f"export_student/{budget}/parity.json" for budget in BUDGETS],
        }
        words = ["--settings", job_settings(self.config, "report"), "--seed", "3", "--threads", "1"]
        for flag, name in single.items():
            words += [] if flag in without else [f"--{flag}", str(self.path(name))]
        for flag, names in several.items():
            words += [f"--{flag}", *([""] if flag in without else [str(self.path(name)) for name in names])]
        return words
