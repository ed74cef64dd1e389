"""Training of teacher, control and supernet phases: one step, one loop, resumable at any step."""

from proard.training.counted import StepTally
from proard.training.plan import Drawn, Plan, phase_plan, single_plan
from proard.training.pricing import passes_alone, planned_work, price, within_budget
from proard.training.run import ImageSource, Run
from proard.training.state import Interrupted, ResumeState, fingerprint
from proard.training.step import StepBatch, StepResult, TrainingStep, training_step

__all__ = [
    "Drawn",
    "ImageSource",
    "Interrupted",
    "Plan",
    "ResumeState",
    "Run",
    "StepBatch",
    "StepResult",
    "StepTally",
    "TrainingStep",
    "fingerprint",
    "passes_alone",
    "phase_plan",
    "planned_work",
    "price",
    "single_plan",
    "training_step",
    "within_budget",
]
