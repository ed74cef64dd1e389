"""One entry point per rule: `python -m proard.stages.STAGE`. Files and settings in, files out, nothing else.

Threads of a job that wait for each other soon sleep instead of spinning: beside other work, spinning threads slow a
training 5 to 15 times. To sleep at once costs the small networks of two-core trainings a third of their speed, so GNU's
OpenMP first spins for some microseconds, which beside other work costs nothing (measured). OpenMP reads the variables
when torch is imported, which is after this package.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
