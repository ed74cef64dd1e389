"""What a first run on a cluster trips over, checked before it does, each with the way to mend it."""

from proard.doctor.checkup import checkup
from proard.doctor.finding import Finding

__all__ = ["Finding", "checkup"]
