"""Training of teacher, control and supernet phases: one loop, resumable at any step."""

from proard.training.loop import ImageSource, fit
from proard.training.plan import Drawn, Plan, phase_plan, single_plan
from proard.training.state import Interrupted, ResumeState, fingerprint

__all__ = [
    "Drawn",
    "ImageSource",
    "Interrupted",
    "Plan",
    "ResumeState",
    "fingerprint",
    "fit",
    "phase_plan",
    "single_plan",
]
