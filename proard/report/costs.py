"""The costs of a run, from its ledgers, and those of as many students trained one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from proard import artifacts
from proard.config import NEEDS, ConfigError, Phase, RunConfig, UserError, parse
from proard.space import SearchSpace, read_space

LEDGER = "costs.parquet"
BOTH_NEED = ("prepare_data", "train_teacher")  # students trained one by one have the same data and the same teacher
SEARCH = ("sample_archs", "evaluate_archs", "merge_table", "fit_predictor", "search_front", "verify_front")
SUPERNET = ("train_phase", *SEARCH)
MEASURED_IN = ("evaluate_archs/*/table.parquet", "verify_front/front.parquet", "select_student/*/student.parquet")
PER_STUDENT = ("select_student", "export_student")
SUMMED = (
    "seconds",
    "device_seconds",
    "forward_equivalents",
    "work_macs",
    "train_macs",
    "measure_macs",
    "cached_forward_equivalents",
    "cached_macs",
    "energy_wh",
)


def read_ledgers(folder: str | Path) -> pd.DataFrame:
    """The COSTS rows of every job of a run, in the order of the stages.

    Costs of older jobs, without a ledger, are from their histories and tables; `counted` names the source of a row.
    Multiply-accumulates of such a training are computed from its settings, and are missing if that is not possible.

    Raises
    ------
    UserError
        The folder holds neither.
    """
    folder = Path(folder)
    patterns = (f"*/{LEDGER}", f"*/*/{LEDGER}", f"train_*/*/*/{LEDGER}")  # the last: a phase of an experiment
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    frames = [artifacts.read_table(path, columns=["stage", "job", "work_macs"]) for path in paths]
    rows = [frame.assign(counted="ledger") for frame in frames]
    known = {path.parent for path in paths}
    histories = [*folder.glob("train_*/history.parquet"), *folder.glob("train_*/*/history.parquet")]
    rows += [frame for path in sorted(histories) if path.parent not in known for frame in _from_history(folder, path)]
    tables = [path for pattern in MEASURED_IN for path in sorted(folder.glob(pattern)) if path.parent not in known]
    rows += [_from_table(path) for path in tables]
    if not rows:
        raise UserError(
            f"{folder} holds no {LEDGER} and no history of a training; expected a run's folder, results/RUN"
        )
    order = {stage: index for index, stage in enumerate(NEEDS)}
    table = pd.concat(rows, ignore_index=True)
    table["place"] = table["stage"].map(lambda stage: order.get(stage, len(order)))
    return table.sort_values(["place", "stage", "job"], kind="stable", ignore_index=True).drop(columns="place")


def _from_history(folder: Path, path: Path) -> list[pd.DataFrame]:
    """A training's costs from its history: without validation, memory and energy."""
    history, metadata = artifacts.read_table(path), artifacts.read_metadata(path)
    if history.empty or pd.isna(history["forward_equivalents"].iloc[-1]):
        return []
    last, stage = history.iloc[-1], metadata["stage"]
    macs = last.get("work_macs")
    if macs is None or pd.isna(macs):
        macs = _recounted(folder, stage, history, metadata)
    row = {
        "stage": stage,
        "job": path.parent.name if path.parent.name != stage else "",
        "seconds": last["seconds"],
        "forward_equivalents": last["forward_equivalents"],
        "work_macs": macs,
        "weight_gradients": last.get("weight_gradients"),
        "train_forward_equivalents": last["forward_equivalents"],
        "train_macs": macs,
        "counted": "history",
    }
    return [pd.DataFrame([row]).astype({"work_macs": float, "train_macs": float, "weight_gradients": float})]


def _from_table(path: Path) -> pd.DataFrame:
    """Costs of a table's measurements: clean passes and attacks, without recalibration, memory and energy."""
    table = artifacts.read_table(path, columns=["arch_id", "macs", "split", "attack", "num_images", "gradients"])
    table, stage = table[table["attack"] != "worst"], artifacts.read_metadata(path)["stage"]
    first = ~table.duplicated(["arch_id", "split", "num_images"])  # one clean pass serves all attacks on its images
    forwards = 2.0 * table["gradients"] + table["num_images"].where(first, 0)
    row = {
        "stage": stage,
        "job": path.parent.name if path.parent.name != stage else "",
        "seconds": float(table["seconds"].sum()),
        "forward_equivalents": forwards.sum(skipna=False),
        "work_macs": (forwards * table["macs"]).sum(skipna=False),
        "counted": "table",
    }
    measured = {"measure_forward_equivalents": row["forward_equivalents"], "measure_macs": row["work_macs"]}
    return pd.DataFrame([row | measured])


def _recounted(folder: Path, stage: str, history: pd.DataFrame, metadata: dict[str, Any]) -> float | None:
    """Multiply-accumulates of a training that counted passes only; None if they are unknown."""
    last, known = history.iloc[-1], history["macs"].dropna()
    forwards = int(last["forward_equivalents"])
    if stage in ("train_teacher", "train_control") and len(known):
        return forwards * float(known.iloc[-1])  # teacher, control and a helper have one size
    return None


def _passes_alone(ledgers: pd.DataFrame, space: SearchSpace, phase: Phase) -> tuple[float, float]:
    """Passes of one image in a step of a student alone; counted again if the phase's ledger does not have them."""
    columns = ["alone_forward_equivalents", "alone_other_forwards"]
    of_phase = (ledgers["stage"] == "train_phase") & (ledgers["job"] == phase.name)
    known = ledgers.reindex(columns=columns)[of_phase].dropna()
    if len(known):
        return float(known[columns[0]].iloc[0]), float(known[columns[1]].iloc[0])
    from proard.training import passes_alone  # torch only where it is needed

    return passes_alone(space, phase, phase.loss)


def _macs_of(path: Path) -> int:
    """Multiply-accumulates of a network on disk, from its header."""
    header = artifacts.read_header(path)
    space = read_space(header["space"])
    return space.spec(space.read_arch(header["arch"])).macs


def by_stage(ledgers: pd.DataFrame) -> pd.DataFrame:
    """One row per stage: jobs, sums of costs, the largest memory of a job; a sum is missing where any part is."""
    columns = ["stage", *SUMMED, "peak_rss_bytes", "peak_cuda_bytes"]
    grouped = ledgers.reindex(columns=columns).groupby("stage", sort=False)
    table = grouped[list(SUMMED)].sum(min_count=1)
    table[list(SUMMED)] = table.where(~grouped[list(SUMMED)].agg(lambda part: part.isna().any()).astype(bool))
    table.insert(0, "jobs", grouped.size())
    for name in ("peak_rss_bytes", "peak_cuda_bytes"):
        table[name] = grouped[name].max()
    return table.reset_index()


def emissions(watt_hours: float, country: str) -> float:
    """Grams of CO2 equivalents of that much electricity, at CodeCarbon's yearly mean for a country (ISO 3166 alpha-3).

    Raises
    ------
    UserError
        CodeCarbon has no figure for that country.
    """
    from codecarbon.input import DataSource

    mix = DataSource().get_global_energy_mix_data()
    if "carbon_intensity" not in mix.get(country, {}):
        raise UserError(f"country {country!r} is not known; expected three letters as in USA, SWE or DEU (ISO 3166)")
    return watt_hours / 1e3 * float(mix[country]["carbon_intensity"])


def _in_order(histories: Iterable[Path]) -> list[dict[str, Any]]:
    """Metadata of the phases' histories, each phase after the one whose supernet it read."""
    waiting = {path: artifacts.read_metadata(path) for path in histories}
    ordered: list[dict[str, Any]] = []
    newest: str | None = None
    while waiting:
        following = [path for path, found in waiting.items() if found["inputs"].get("supernet.safetensors") == newest]
        path = following[0] if following else next(iter(waiting))
        ordered.append(waiting.pop(path))
        newest = artifacts.sha256(path.with_name("supernet.safetensors"))
    return ordered


@dataclass(frozen=True)
class CostComparison:
    """A supernet run compared with as many students trained one by one, in multiply-accumulates.

    Attributes
    ----------
    shared : float
        Cost of both: data, teacher, and the control if the loss needs it.
    training : float
        Training steps of all phases, a part of `once`.
    once : float
        Cost of the supernet for any number of students: its training, the table, predictor, search and their
        measurements, results found in the cache included.
    each : float
        Cost of choosing and exporting one student.
    images : dict of str to float
        Training images, and so gradient evaluations, of one student alone, by budget.
    own, others : float
        Passes of one image in its training step: through itself, through frozen networks of the teacher's size.
    teacher_macs : int
    students : dict of str to int
        MACs of the exported students, by budget of the export.
    mean_macs : float
        Mean MACs of the sampled archs.
    """

    shared: float
    training: float
    once: float
    each: float
    images: dict[str, float]
    own: float
    others: float
    teacher_macs: int
    students: dict[str, int]
    mean_macs: float

    def alone(self, macs: float, budget: str = "steps") -> float:
        """Multiply-accumulates of the training steps of one student of that size, trained alone."""
        return self.images[budget] * (self.own * macs + self.others * self.teacher_macs)

    def ratio(self, number: float, macs: float, budget: str = "steps") -> float:
        """Cost of training `number` students one by one, divided by that of getting them from the supernet."""
        return (self.shared + number * self.alone(macs, budget)) / (self.shared + self.once + number * self.each)

    def training_ratio(self, number: float, macs: float, budget: str = "steps") -> float:
        """The same for trainings only, the teacher's on both sides."""
        return (self.shared + number * self.alone(macs, budget)) / (self.shared + self.training)

    def break_even(self, macs: float, budget: str = "steps") -> int | None:
        """The smallest number of students for which the supernet costs no more; None if there is none."""
        gain = self.alone(macs, budget) - self.each
        return max(math.ceil(self.once / gain), 1) if gain > 0 else None

    @property
    def sizes(self) -> dict[str, float]:
        """Mean MACs of one student: of the sampled archs, and of the exported students where there are any."""
        sizes = {"mean of the sampled subnets": self.mean_macs}
        if self.students:
            sizes["mean of the exported students"] = sum(self.students.values()) / len(self.students)
        return sizes


def compare(folder: str | Path, ledgers: pd.DataFrame) -> CostComparison | str:
    """Compare a run with students trained one by one on the loss of its last phase, or name what is missing for that.

    `steps` gives each student as many optimizer steps, and images, as all phases made. `path`, if the supernet was
    initialised with the teacher's weights, adds the teacher's steps: all steps that changed the subnet's weights.
    """
    folder = Path(folder)
    phases = {path.parent.name: path for path in folder.glob("train_phase/*/history.parquet")}
    teacher, archs = folder / "train_teacher" / "teacher.safetensors", folder / "sample_archs" / "archs.parquet"
    missing = [str(path) for path in (teacher, archs) if not path.exists()]
    missing += [] if phases else [f"{folder}/train_phase/PHASE/history.parquet"]
    stages = {*BOTH_NEED[1:], *SUPERNET[:1]} & set(ledgers.loc[ledgers["work_macs"].isna(), "stage"])
    missing += [f"the multiply-accumulates of {stage}" for stage in sorted(stages)]
    if missing:
        return f"no comparison without {', '.join(missing)}"
    try:
        settings = [parse(RunConfig, metadata["settings"]) for metadata in _in_order(phases.values())]
    except ConfigError as error:
        return f"no comparison: the phases were trained by another version of the package ({error})"
    (first,), (last,) = settings[0].train_phase.phases, settings[-1].train_phase.phases
    own, others = _passes_alone(ledgers, SearchSpace(settings[-1].space), last)
    steps = float(sum(artifacts.read_table(path)["images"].iloc[-1] for path in phases.values()))
    images = {"steps": steps}
    history = artifacts.read_table(folder / "train_teacher" / "history.parquet")
    if first.warm_start == "teacher" and len(history):
        images["path"] = steps + float(history["images"].iloc[-1])

    def spent(stages: Iterable[str]) -> pd.DataFrame:
        rows = ledgers[ledgers["stage"].isin(list(stages))]
        return rows["work_macs"].fillna(0) + rows.get("cached_macs", pd.Series(0.0, rows.index)).fillna(0)

    tables = [artifacts.read_table(path) for path in sorted(folder.glob("select_student/*/student.parquet"))]
    choices = [table[table["chosen"].eq(True)].iloc[0] for table in tables]
    chosen = {str(choice["budget"]): int(choice["macs"]) for choice in choices}
    jobs = max(ledgers.loc[ledgers["stage"] == "select_student", "job"].nunique(), 1)
    return CostComparison(
        shared=float(spent([*BOTH_NEED, *(["train_control"] if last.needs_control else [])]).sum()),
        training=float(ledgers.loc[ledgers["stage"] == "train_phase", "train_macs"].sum()),
        once=float(spent(SUPERNET).sum()),
        each=float(spent(PER_STUDENT).sum()) / jobs,
        images=images,
        own=own,
        others=others,
        teacher_macs=_macs_of(teacher),
        students=dict(sorted(chosen.items(), key=lambda entry: entry[1])),
        mean_macs=float(np.mean(artifacts.read_table(archs)["macs"])),
    )
