"""Helpers of the rules: the checked config, what a job is told of it, and resources."""

import os
import re
import sys
from pathlib import Path

try:
    import proard.config
    from proard.space import SearchSpace, parse_budget
    from proard.space.cost import human
    from proard.space.sampling import shard_names
except ImportError as error:
    sys.exit(
        f"error: {sys.executable}, which runs snakemake, cannot import the package proard ({error}); "
        "install it there: pip install -e ."
    )

try:
    run = proard.config.load(config)
except proard.config.ConfigError as error:
    sys.exit(f"error: config: {error}")

# Jobs use the python and the package of this process, in an environment that was never activated too.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))

PHASES = [phase.name for phase in run.train_phase.phases]
BUDGETS = list(run.select_student.budgets)
SUPERNET = f"<results>/train_phase/{PHASES[-1]}/supernet.safetensors"
CACHE = f"results/{run.run}/cache"  # measurements already made; undeclared, so that no rule ever deletes it


def archive_to_choose_from(wildcards):
    """The searched archs; a budget that no subnet can meet stops here, before the first job."""
    space = SearchSpace(run.space)
    try:
        budget = parse_budget(wildcards.budget)
    except proard.config.ConfigError as error:
        sys.exit(f"error: {error}")
    smallest = getattr(space.spec(space.smallest), budget.column)
    if smallest > budget.limit:
        sys.exit(
            f"error: budget {budget.text} is below the smallest subnet of space {run.space.name}: "
            f"the smallest feasible cost is {budget.column}={smallest} ({human(smallest)})"
        )
    return "<results>/search_front/archive.parquet"


def shards():
    """Row ranges of archs.parquet, one per evaluation job."""
    return shard_names(run.sample_archs.num_archs, run.evaluate_archs.archs_per_shard)


def settings(stage):
    """The sections that a stage reads, as JSON. Budgets are wildcards: listing another one changes no job."""
    of_any_budget = run.select_student.model_copy(update={"budgets": ()})
    return proard.config.job_settings(run.model_copy(update={"select_student": of_any_budget}), stage)


def phase_settings(wildcards):
    """The sections of one phase, as JSON: editing a later phase repeats no earlier one."""
    return proard.config.job_settings(run, "train_phase", phase=wildcards.phase)


def previous_supernet(wildcards):
    """What the phase starts from; nothing for the first."""
    earlier = PHASES[: PHASES.index(wildcards.phase)][-1:]
    return [f"<results>/train_phase/{phase}/supernet.safetensors" for phase in earlier]


def plain_network(section):
    """The control network, where a loss asks it: HAT's helper, MTARD's clean teacher."""
    return ["<results>/train_control/control.safetensors"] if section.needs_control else []


def plain_network_of_phase(wildcards):
    """The same of one phase."""
    return plain_network(run.train_phase.phases[PHASES.index(wildcards.phase)])


def per_attempt(amount):
    """A resource that grows with every attempt."""
    return lambda wildcards, attempt: amount * attempt


def squeeze_shell_lines():
    """Make white space in a shell line mean nothing: Snakemake would repeat a training for it."""
    for each in workflow.rules:
        if each.shellcmd is not None:
            each.shellcmd = " ".join(each.shellcmd.split())


def say_where_results_are():
    """Name the report and the students that exist."""
    results = Path("results") / run.run
    page, students = results / "report" / "report.html", sorted(results.glob("export_student/*/student.onnx"))
    if page.exists():
        print(f"Report: {page}", file=sys.stderr)
    if students:
        print(f"Students: {results / 'export_student'} ({len(students)})", file=sys.stderr)
