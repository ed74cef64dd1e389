"""Columns of the tables of experiments: outcomes per image, means over seeds, gains and gaps."""

from __future__ import annotations

import pyarrow as pa

from proard.artifacts.tables import FLOAT, IDENTITY, INT, MEASURED, TEXT

TRAININGS: dict[str, tuple[pa.DataType, str]] = {
    **MEASURED,
    "training": (TEXT, "name of the training with grid and seed; for a selected student its budget"),
    "group": (TEXT, "name without the seed"),
    "trains": (TEXT, "network, twin or supernet; budget: a student selected by select_student"),
    "role": (
        TEXT,
        "network: trained alone; twin: alone, beside a subnet; subnet: of a supernet; chosen: of a budget",
    ),
    "net": (TEXT, "name of the network or of its space"),
    "loss": (TEXT, "loss of the training"),
    "train_seed": (INT, "seed of the training; `seed` is that of the measurement"),
    "train_steps": (INT, "attack steps of the training; 0: trained without an attack"),
    "train_step_size": (FLOAT, "step of that attack, pixel units of [0, 1]"),
    "lr": (FLOAT, "highest learning rate"),
    "epochs": (FLOAT, "passes over the training images"),
    "kept_epoch": (INT, "epoch whose weights are kept"),
    "val_clean_acc": (FLOAT, "fraction of val at the kept epoch"),
    "val_robust_acc": (FLOAT, "fraction of val at the kept epoch, PGD of the validation"),
    "effort": (TEXT, "JSON of the equal-effort rule; empty without one"),
    "optimizer_steps": (INT, "optimizer steps of the training"),
    "train_images": (INT, "training images seen"),
    "train_gradients": (INT, "backward passes of one image: attack steps, input gradients of the loss, updates"),
    "train_forward_equivalents": (INT, "image forward-equivalents of the training, including the teacher's"),
    "train_macs": (FLOAT, "multiply-accumulates of the training, as counted"),
    "train_seconds": (FLOAT, "wall seconds of the training, including validation"),
    "seconds_per_epoch": (FLOAT, "wall seconds of the training per epoch, including validation"),
    "peak_memory": (INT, "largest resident memory of the training's process, bytes"),
    "peak_device_memory": (INT, "largest memory on the accelerator, bytes; empty on a CPU"),
}
INTERVAL = "fraction, 95 % over seeds and images"
GAINS: dict[str, tuple[pa.DataType, str]] = {
    "group": (TEXT, "name of the training without its seed"),
    "split": (TEXT, "val or test"),
    "attack": (TEXT, "name of the attack; worst is the worst case per image over all attacks on test"),
    "eps": (FLOAT, "pixel units of [0, 1]"),
    "subnet": (TEXT, "mean over the measured subnets, the worst of them, the smallest or the largest"),
    **{
        f"{kind}_{name}{end}": (FLOAT, meaning if not end else INTERVAL)
        for kind in ("clean", "robust")
        for name, meaning in (("acc", "fraction, mean over seeds"), ("gain", "fraction, over the baseline"))
        for end in ("", "_low", "_high")
    },
    "baseline": (TEXT, "training to which the gains are relative"),
    "num_seeds": (INT, "trainings"),
    "num_archs": (INT, "measured subnets of each training"),
    "num_images": (INT, "images"),
    "optimizer_steps": (INT, "optimizer steps of one training, mean over seeds"),
    "train_images": (INT, "training images seen in one training, mean over seeds"),
    "train_forward_equivalents": (INT, "image forward-equivalents of one training as counted, mean over seeds"),
    "train_macs": (FLOAT, "multiply-accumulates of one training as counted, mean over seeds"),
    "train_seconds": (FLOAT, "wall seconds of one training, including validation, mean over seeds"),
}
GAPS: dict[str, tuple[pa.DataType, str]] = {
    **IDENTITY,
    "split": (TEXT, "val or test"),
    "attack": (TEXT, "name of the attack; worst is the worst case per image over all attacks of the stage"),
    "measure": (TEXT, "clean or robust"),
    "num_images": (INT, "images, the same for subnet and twin"),
    "num_seeds": (INT, "twins of this arch"),
    "subnet_acc": (FLOAT, "fraction"),
    "twin_acc": (FLOAT, "fraction, mean over seeds"),
    "gap": (FLOAT, "fraction, subnet minus twin"),
    "gap_low": (FLOAT, "fraction, 95 % over images and, where there are several, over seeds; paired"),
    "gap_high": (FLOAT, "fraction, 95 % over images and, where there are several, over seeds; paired"),
    "gap_sd_over_seeds": (FLOAT, "fraction, standard deviation of the gap over seeds; empty for one seed"),
    "subnet_only": (FLOAT, "fraction of images that only the subnet classifies correctly, mean over seeds"),
    "twin_only": (FLOAT, "fraction of images that only the twin classifies correctly, mean over seeds"),
    "seed": (INT, "seed of the redraws"),
}
