"""Columns of the tables that compare variants of a training."""

from __future__ import annotations

from proard.artifacts.tables import FLOAT, INT, MEASURED, TEXT

VARIANT_MEASURED = {
    **MEASURED,
    "variant": (TEXT, "name of the variant"),
    "train_seed": (INT, "seed of the training; `seed` is that of the measurement"),
}
INTERVAL = "fraction, 95 % over seeds and images"
COMPARED = {
    "variant": (TEXT, "name of the variant"),
    "split": (TEXT, "val or test"),
    "attack": (TEXT, "name of the attack; worst is the worst case per image over all attacks on test"),
    "subnet": (TEXT, "mean over the measured subnets, the worst of them, the smallest or the largest"),
    **{
        f"{kind}_{name}{end}": (FLOAT, meaning if not end else INTERVAL)
        for kind in ("clean", "robust")
        for name, meaning in (("acc", "fraction, mean over seeds"), ("gain", "fraction, over the baseline variant"))
        for end in ("", "_low", "_high")
    },
    "baseline": (TEXT, "variant that the gains are over"),
    "num_seeds": (INT, "trainings"),
    "num_archs": (INT, "measured subnets of each"),
    "num_images": (INT, "images"),
    "steps": (INT, "optimizer steps of one training, mean over seeds"),
    "images": (INT, "training images seen in one training, mean over seeds"),
    "forward_equivalents": (INT, "image forward-equivalents of one training as counted, mean over seeds"),
    "training_macs": (FLOAT, "multiply-accumulates of one training, each pass weighted by its network, from the plan"),
    "seconds": (FLOAT, "wall seconds of one training, validation included, mean over seeds"),
}
