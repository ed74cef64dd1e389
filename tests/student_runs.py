"""Networks trained alone on the stripes: the stages from settings to files."""

from __future__ import annotations

import torch
from helpers import CONFIG, save_stripes, tiny_space

from proard.artifacts import Provenance, read_table
from proard.attacks import pgd
from proard.config import job_settings, load
from proard.nets import load_static, save_static
from proard.nets.elastic import Supernet
from proard.nets.subnet import extract
from proard.stages import measure_experiment, train_experiment

SHORT = {key: value for key, value in CONFIG["train_phase"]["phases"][0].items() if key != "name"}


def config_of(*students, measure=None, **shared):
    """The tiny run with these networks as its experiment."""
    section = {"defaults": {**SHORT, **shared}, "trainings": list(students), "measure": measure or {}}
    return load({**CONFIG, "experiment": section})


def student_files(folder):
    """Stripes, a teacher and a plainly trained network of the tiny space, as files."""
    paths = save_stripes(folder)
    space = tiny_space()
    net = extract(Supernet(space, mean=[0.4], std=[0.3], generator=torch.Generator().manual_seed(7)), space.largest)
    for kind in ("teacher", "control"):
        paths[kind] = folder / f"{kind}.safetensors"
        made_by = Provenance("tiny", f"train_{kind}")
        save_static(paths[kind], net.eval(), space=space, arch=space.largest, kind=kind, provenance=made_by)
    return paths


def train(files, folder, student, *, seed=0, networks=("teacher", "control"), search=pgd):
    """Train one student as the stage does; the network, its space and arch, its history and its files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"weights": folder / "weights.safetensors", "history": folder / "history.parquet"}
    flags = {**{name: files[name] for name in ("train", "val", *networks)}, **written}
    settings = job_settings(config_of(student), "train_experiment", training=student["name"])
    argv = ["--settings", settings, "--seed", str(seed), "--threads", "1", "--device", "cpu"]
    argv += [word for name, path in flags.items() for word in (f"--{name}", str(path))]
    train_experiment.main(argv, search=search)
    net, space, arch, _ = load_static(written["weights"], kind="trained_student")
    return net, space, arch, read_table(written["history"]), written


def evaluated(files, folder, student):
    """Train and measure a network; its outcomes and the files."""
    *_, written = train(files, folder, student)
    settings = job_settings(config_of(student, measure=MEASURE), "measure_experiment", training=student["name"])
    written["outcomes"] = folder / "outcomes.parquet"
    flags = {"test": files["test"], "weights": written["weights"], "histories": written["history"]}
    argv = ["--settings", settings, "--seed", "0", "--threads", "1", "--device", "cpu"]
    argv += [word for name, path in flags.items() for word in (f"--{name}", str(path))]
    measure_experiment.main([*argv, "--outcomes", str(written["outcomes"])])
    return read_table(written["outcomes"]), written


MEASURE = {
    "eps": [0.05, 0.1],
    "attacks": [
        {"name": "fgsm", "num_steps": 1, "step_size": 0.1, "start": "zero"},
        {"name": "pgd4", "num_steps": 4, "step_size": 0.04},
    ],
}
