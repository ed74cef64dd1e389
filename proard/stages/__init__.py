"""One entry point per rule: `python -m proard.stages.STAGE`. Files and settings in, files out, nothing else.

Threads of a job that wait for each other sleep instead of spinning: beside other work, spinning threads slow a training
5 to 15 times. OpenMP reads the variable when torch is imported, which is after this package.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
