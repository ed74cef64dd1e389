"""One entry point per rule: `python -m proard.stages.STAGE`. Files and settings in, files out, nothing else."""
