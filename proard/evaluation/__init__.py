"""Clean and robust accuracy on a fixed image set, as table rows; subnets after recalibration, with a cache."""

from proard.evaluation.adversary import Outcome, attack_images, clean_correct, stands_training_attack
from proard.evaluation.meter import Conditions, SubnetMeter, measure, rows_of, work_of

__all__ = [
    "Conditions",
    "Outcome",
    "SubnetMeter",
    "attack_images",
    "clean_correct",
    "measure",
    "rows_of",
    "stands_training_attack",
    "work_of",
]
