"""Checks of a machine and a cluster before a first run, each with the way to fix what fails."""

from proard.doctor.checkup import checkup
from proard.doctor.finding import Finding

__all__ = ["Finding", "checkup"]
