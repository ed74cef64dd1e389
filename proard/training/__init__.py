"""Training of teacher, control and supernet phases: one loop, resumable at any step."""

from proard.training.loop import ImageSource, fit
from proard.training.plan import Drawn, Plan, phase_plan, single_plan
from proard.training.state import Interrupted, ResumeState, fingerprint
from proard.training.work import Work, planned_work, within_budget

__all__ = [
    "Drawn",
    "ImageSource",
    "Interrupted",
    "Plan",
    "ResumeState",
    "Work",
    "fingerprint",
    "fit",
    "phase_plan",
    "planned_work",
    "single_plan",
    "within_budget",
]
