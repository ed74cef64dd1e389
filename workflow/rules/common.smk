"""Helpers of the rules: the checked config, the settings and inputs of each job, and resources."""

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from shlex import quote

import yaml

# A folder named proard on sys.path hides an editable install of the package.
found = importlib.machinery.PathFinder.find_spec("proard", [os.getcwd(), *sys.path])
if found is not None and found.origin is None:
    sys.exit(
        f"error: Python takes the folder {list(found.submodule_search_locations)[0]} for the package proard; "
        "start snakemake in another folder, best in the clone itself, or rename that folder"
    )

try:
    import proard.config
    from proard.config.fingerprint import image_fingerprint
    from proard.space import SearchSpace, parse_budget, read_device
    from proard.space.cost import check_budget
    from proard.space.sampling import shard_names
    from proard.space.twins import with_twins
except ImportError as error:
    remedy = f"{sys.executable}, which runs snakemake, cannot import it ({error}); install it there: pip install -e ."
    if "--lint" in sys.argv:  # this is enough for the workflow catalogue
        print(f"note: nothing linted: the rules need the package proard; {remedy}", file=sys.stderr)
        sys.exit(0)
    sys.exit(f"error: the rules need the package proard; {remedy}")

try:
    for file in workflow.configfiles:  # Snakemake keeps the last of two equal keys without a warning
        proard.config.read_file(file)
    run = with_twins(proard.config.load(config))
    SPACE = SearchSpace(run.space, read_device(run.device))  # with the costs that budgets limit
except proard.config.UserError as error:
    sys.exit(f"error: config: {error}")

# Jobs use the python and the package of this process, even if its environment is not activated.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))

PHASES = [phase.name for phase in run.train_phase.phases]
DEVICE = [run.device] if run.device else []
BUDGETS = list(run.select_student.budgets)
ATTACKABLE = run.space.classes >= proard.config.LEAST_CLASSES
AUTOATTACKED = BUDGETS if run.autoattack_student.run and ATTACKABLE else []
CHECKED = BUDGETS if run.check_student.run else []
IN_EXECUTORCH = BUDGETS if run.executorch_student.run else []
DESCRIBED = BUDGETS if AUTOATTACKED or CHECKED else []
if run.autoattack_student.run and not ATTACKABLE and workflow.is_main_process:
    print(f"note: AutoAttack needs {proard.config.LEAST_CLASSES} classes; its stage is left out", file=sys.stderr)
TRAININGS = {training.name: training for training in run.experiment.trainings}
ALONE = [name for name, training in TRAININGS.items() if training.trains != "supernet"]
LEGS = {name: (TRAININGS[name], None) for name in ALONE}  # what one job trains: a network, or a phase of a supernet
LEGS |= {
    f"{name}/{phase.name}": (training, phase)
    for name, training in TRAININGS.items()
    if name not in ALONE
    for phase in training.phases
}
NETWORKS = {network.name: network for network in run.diagnose.networks}
DIAGNOSED = [proard.config.TEACHER, *NETWORKS]
SUPERNET = f"<results>/train_phase/{PHASES[-1]}/supernet.safetensors"
CACHE = f"results/{run.run}/cache"  # measurements already made; not declared, so that no rule deletes it

NOTES = set()  # printed notes about budgets, to print each once


def searched_archive(wildcards):
    """The searched archs; a budget below the smallest cost stops the run here, before the first job."""
    try:
        note = check_budget(wildcards.budget, SPACE)
        spelling = parse_budget(wildcards.budget).text
    except proard.config.ConfigError as error:
        sys.exit(f"error: {error}")
    if spelling != wildcards.budget:
        target = f"results/{run.run}/export_student/{spelling}/student.onnx"
        sys.exit(f"error: budget {wildcards.budget} has the folder {spelling}; use the target {target}")
    if note and note not in NOTES and workflow.is_main_process:
        print(f"note: {note}", file=sys.stderr)
        NOTES.add(note)
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


def settings_of_leg(wildcards):
    """The sections of one job of an experiment, as JSON: another training or seed repeats none of the others."""
    training, phase = LEGS[wildcards.leg]
    name = None if phase is None else phase.name
    return proard.config.job_settings(run, "train_experiment", training=training.name, phase=name)


def seed_of_leg(wildcards):
    """The seed of a training: its own, or the run's."""
    own = LEGS[wildcards.leg][0].seed
    return run.seed if own is None else own


def teacher_of_leg(wildcards):
    """The run's teacher, if the loss needs it."""
    training, phase = LEGS[wildcards.leg]
    needed = phase is not None or training.reads_teacher
    return ["<results>/train_teacher/teacher.safetensors"] if needed else []


def plain_network_of_leg(wildcards):
    """The control network, where the loss needs it."""
    training, phase = LEGS[wildcards.leg]
    return plain_network(phase or training)


def legs_of(name):
    """The jobs of a training, in order."""
    return [leg for leg, (training, _) in LEGS.items() if training.name == name]


def weights_of(name):
    """The weights that a training ends with."""
    return f"<results>/train_experiment/{legs_of(name)[-1]}/weights.safetensors"


def previous_leg(wildcards):
    """The weights that a phase of a supernet starts from; none for the first."""
    legs = legs_of(LEGS[wildcards.leg][0].name)
    earlier = legs[: legs.index(wildcards.leg)][-1:]
    return [f"<results>/train_experiment/{leg}/weights.safetensors" for leg in earlier]


def supernet_beside_twin(wildcards):
    """The supernet whose subnet a twin is compared with: of a training of the experiment, or the run's."""
    training = TRAININGS[wildcards.training]
    if training.trains != "twin":
        return []
    return [SUPERNET if training.beside is None else weights_of(training.beside)]


def archs_of_supernet(wildcards):
    """The archs at which supernets are measured."""
    return ["<results>/sample_archs/archs.parquet"] if wildcards.training not in ALONE else []


def images_of_subnets(wildcards):
    """The images that reset the batch norm of subnets and of their twins."""
    alone = TRAININGS[wildcards.training].trains == "network"
    return [] if alone else ["<results>/prepare_data/train.safetensors"]


def compared(folder):
    """Files that the comparison writes beside its table, by flag, for the kinds in the config."""
    kinds = {training.trains for training in TRAININGS.values()}
    listed = {"networks": bool(ALONE) or run.experiment.budgets, "supernets": "supernet" in kinds}
    listed |= {"twins": "twin" in kinds, "diagnoses": bool(NETWORKS)}
    files = proard.config.COMPARED
    return {flag: f"{folder}/{file}" for kind in files if listed[kind] for flag, file in files[kind].items()}


def flags_of(files, *names):
    """Flags for the named files that a job has."""
    named = {name: getattr(files, name) for name in names}
    return " ".join(f"--{name.replace('_', '-')} {quote(str(path))}" for name, path in named.items() if path)


def is_of_training(name):
    """Whether the exported student is a network of the experiment; its supernets export nothing."""
    if name in TRAININGS and name not in ALONE:
        sys.exit(f"error: training {name} makes a supernet; only single networks are exported")
    return name in TRAININGS


def rows_to_export(wildcards):
    """The measurements of the exported student: of a training's outcomes, or of the choice for a budget."""
    if is_of_training(wildcards.budget):
        return f"<results>/measure_experiment/{wildcards.budget}/outcomes.parquet"
    return f"<results>/select_student/{wildcards.budget}/student.parquet"


def weights_to_export(wildcards):
    """The weights of a training, if its network is exported."""
    trained = is_of_training(wildcards.budget)
    return [f"<results>/train_experiment/{wildcards.budget}/weights.safetensors"] if trained else []


def supernet_to_export(wildcards):
    """The supernet that a budget's student is extracted from."""
    return [] if is_of_training(wildcards.budget) else [SUPERNET]


def images_to_export(wildcards):
    """The images that reset the batch norm of a budget's student, or of a twin."""
    alone = is_of_training(wildcards.budget) and TRAININGS[wildcards.budget].trains == "network"
    return [] if alone else ["<results>/prepare_data/train.safetensors"]


def table_of_autoattack(wildcards):
    """AutoAttack's outcomes of the exported student, if the run includes that stage."""
    asked = run.autoattack_student.run and ATTACKABLE
    return [f"<results>/autoattack_student/{wildcards.budget}/table.parquet"] if asked else []


def table_of_checks(wildcards):
    """The checks of the exported student, if the run includes that stage."""
    return [f"<results>/check_student/{wildcards.budget}/checks.parquet"] if run.check_student.run else []


def table_of_int8(wildcards):
    """The measurement of a budget's student in int8; networks of an experiment have none."""
    return [] if is_of_training(wildcards.budget) else [f"<results>/quantize_student/{wildcards.budget}/table.parquet"]


def weights_for_executorch(wildcards):
    """The exported student; without the extra that its stage needs, the run stops here, before the first job."""
    if importlib.util.find_spec("executorch") is None:
        sys.exit(
            "error: executorch_student needs ExecuTorch, which this environment lacks; get it with: "
            "pip install -e .[executorch]"
        )
    return f"<results>/export_student/{wildcards.budget}/student.safetensors"


def teacher_to_transfer_from(wildcards):
    """The run's teacher, where the student was trained with it: attacks are transferred from it."""
    training = TRAININGS.get(wildcards.budget)
    taught = getattr(training, "needs_teacher", True)
    return ["<results>/train_teacher/teacher.safetensors"] if taught else []


def images_to_transfer_from(wildcards):
    """The images that reset the batch norm of another subnet, from which attacks are transferred."""
    return [] if is_of_training(wildcards.budget) else ["<results>/prepare_data/train.safetensors"]


def previous_supernet(wildcards):
    """The weights that the phase starts from; none for the first."""
    earlier = PHASES[: PHASES.index(wildcards.phase)][-1:]
    return [f"<results>/train_phase/{phase}/supernet.safetensors" for phase in earlier]


def file_of_teacher(wildcards):
    """The teacher's file, if the config names one."""
    file = run.train_teacher.file
    if run.train_teacher.source == "train":
        return []
    made = any(each.is_producer(file) for each in workflow.rules)
    if (
        not made
        and not Path(file).exists()
        and not Path(f"results/{run.run}/train_teacher/teacher.safetensors").exists()
    ):
        sys.exit(
            f"error: train_teacher.file is {file}, which does not exist (relative to {Path.cwd()}); correct the path"
        )
    return [file]


def plain_network(section):
    """The control network, if a loss needs it: HAT's helper, MTARD's clean teacher."""
    return ["<results>/train_control/control.safetensors"] if section.needs_control else []


def plain_network_of_phase(wildcards):
    """The same of one phase."""
    return plain_network(run.train_phase.phases[PHASES.index(wildcards.phase)])


def diagnose_settings(wildcards):
    """The sections of one network's diagnosis, as JSON: listing another network changes no job."""
    chosen = tuple(network for network in run.diagnose.networks if network.name == wildcards.network)
    section = run.diagnose.model_copy(update={"networks": chosen})
    return proard.config.job_settings(run.model_copy(update={"diagnose": section}), "diagnose")


def weights_to_diagnose(wildcards):
    """The file of a network that is an exported student or that the config names."""
    network = NETWORKS.get(wildcards.network)
    if network is None or network.arch is not None:
        return []
    return [network.file or f"<results>/export_student/{network.budget}/student.safetensors"]


def supernet_to_diagnose(wildcards):
    """The supernet, if the network is one of its subnets."""
    network = NETWORKS.get(wildcards.network)
    return [SUPERNET] if network is not None and network.arch is not None else []


def images_of_supernet_to_diagnose(wildcards):
    """The images that reset such a subnet's batch norm."""
    return ["<results>/prepare_data/train.safetensors"] if supernet_to_diagnose(wildcards) else []


def per_attempt(amount):
    """A resource that grows with every attempt."""
    return lambda wildcards, attempt: amount * attempt


def parallel_threads(most):
    """Threads of a job that runs in parallel with others: half of this machine's cores, or `most` on a cluster."""

    def threads(wildcards):
        alone = workflow.remote_exec or not workflow.cores
        return most if alone else max(1, min(most, workflow.cores // 2))

    return threads


def gpus_of(rule):
    """GPUs of a rule's jobs: its `gpu`, at most those of the workstation, or the number in a site's `gres`."""
    gpu, limit, gres = (
        str(resources[name].raw) if name in resources else ""
        for name, resources in (("gpu", rule.resources), ("gpu", workflow.global_resources), ("gres", rule.resources))
    )
    asked = re.fullmatch(r"gpu(?::[^:]+)?:([0-9]+)", gres.strip("'"))
    granted = min(int(gpu), int(limit) if limit.isdigit() else int(gpu)) if gpu.isdigit() else 0
    return max(granted, int(asked[1]) if asked else 0)


def start_several_processes():
    """Let trainings with several GPUs start a process for each, without a change of their shell lines."""
    wanted = {each.name: gpus_of(each) for each in workflow.rules if each.name.startswith("train_")}
    os.environ.update(PROARD_PROCESSES=json.dumps({name: gpus for name, gpus in wanted.items() if gpus > 1}))


def normalise_shell_lines():
    """Normalise white space in shell lines: Snakemake would repeat a training for a change of it."""
    for each in workflow.rules:
        if each.shellcmd is not None:
            each.shellcmd = " ".join(each.shellcmd.split())


def keep_config():
    """Write the settings of the run, from all config files and flags together, for later commands on its folder."""
    text = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False, allow_unicode=True)
    header = "# The settings of this run when it was last started, of all config files and --config together.\n"
    kept = Path("results") / run.run / "config.yaml"
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    part.write_text(header + text, encoding="utf-8")
    part.replace(kept)


def print_results():
    """Print the paths of the report and the students that exist."""
    results = Path("results") / run.run
    page, students = results / "report" / "report.html", sorted(results.glob("export_student/*/student.onnx"))
    if page.exists():
        print(f"Report: {page}", file=sys.stderr)
    if students:
        print(f"Students: {results / 'export_student'} ({len(students)})", file=sys.stderr)
