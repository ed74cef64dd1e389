"""Columns of the tables that compare a student in float32 and in int8, image by image."""

from __future__ import annotations

import pyarrow as pa

from proard.artifacts.tables import FLAG, FLOAT, INT, MEASURED, TEXT

LEFT_EMPTY = "empty in rows of float32"
QUANTISED: dict[str, tuple[pa.DataType, str]] = {
    **MEASURED,
    "budget": (TEXT, "the requested limit, or the name of a training"),
    "file": (TEXT, "name of the measured file"),
    "precision": (TEXT, "float32 or int8"),
    "variant": (TEXT, f"how the file was quantised; {LEFT_EMPTY}"),
    "chosen": (FLAG, "the variant that was kept: the one that loses least on val"),
    "crafted_on": (
        TEXT,
        "network that the attack differentiates: twin, student, teacher, runtime (queries, no gradient) or all",
    ),
    "difference": (FLOAT, "fraction, robust accuracy of int8 minus worst case of float32 on the same images"),
    "difference_low": (FLOAT, "fraction, 95 % bootstrap over images, paired"),
    "difference_high": (FLOAT, "fraction, 95 % bootstrap over images, paired"),
    "lost": (INT, "images that are robust in float32 only"),
    "gained": (INT, "images that are robust in int8 only"),
    "mcnemar_p": (FLOAT, "two-sided exact P value of equal robust accuracy"),
    "clean_difference": (FLOAT, "fraction, clean accuracy of int8 minus that of float32"),
    "clean_lost": (INT, "clean images that only float32 gets right"),
    "clean_gained": (INT, "clean images that only int8 gets right"),
    "agreement_clean": (FLOAT, f"fraction of clean images with the same class in twin and runtime; {LEFT_EMPTY}"),
    "agreement_adversarial": (FLOAT, f"the same on attacked images; {LEFT_EMPTY}"),
    "max_logit_difference": (FLOAT, f"largest difference of a logit between twin and runtime; {LEFT_EMPTY}"),
    "agreement_float": (FLOAT, f"fraction of clean images with the same class in int8 and float32; {LEFT_EMPTY}"),
    "zero_gradients": (FLOAT, f"fraction of clean images with a zero input gradient in the twin; {LEFT_EMPTY}"),
    "bytes": (INT, "size of the file"),
    "latency_ms": (FLOAT, "milliseconds of one image on one CPU thread, both files in one run, for orientation"),
    "calibration_images": (INT, f"images of train that the ranges come from; {LEFT_EMPTY}"),
    "calibration_seed": (INT, f"seed that put train into its order, of which these are the first; {LEFT_EMPTY}"),
    "operators": (TEXT, f"JSON: operators after the runtime's optimisation on this CPU, with counts; {LEFT_EMPTY}"),
    "runtime": (TEXT, "runtime and its version"),
    "cpu": (TEXT, "processor"),
    "cpu_flags": (TEXT, "flags of the processor that decide which integer kernels run"),
}
SHARED = (
    *("budget", "file", "precision", "difference", "difference_low", "difference_high", "lost", "gained"),
    *("mcnemar_p", "clean_difference", "clean_lost", "clean_gained", "agreement_float", "bytes", "latency_ms"),
    *("calibration_images", "calibration_seed", "runtime", "cpu", "cpu_flags"),
)
EXECUTORCH: dict[str, tuple[pa.DataType, str]] = {
    **MEASURED,
    **{name: QUANTISED[name] for name in SHARED},
    "agreement_float": (FLOAT, "fraction of clean images with the same class in the program and in the float network"),
    "agreement_clean": (FLOAT, "fraction of clean images with the same class in the program and in its twin in torch"),
    "agreement_adversarial": (FLOAT, "the same on attacked images"),
    "max_logit_difference": (FLOAT, "largest difference of a logit between the program and its twin"),
    "crafted_on": (TEXT, "precision of the twin that the attack differentiates, queries (no gradient) or all"),
}
