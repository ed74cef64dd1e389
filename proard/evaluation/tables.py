"""Tables of a diagnosis: both sides of the bound and radii image by image, their summary, networks in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from proard.artifacts import wilson
from proard.evaluation.certificates import ABSTAIN, Certificate, Clever
from proard.evaluation.pairing import holm, mean_interval, pairing

if TYPE_CHECKING:
    from proard.evaluation.diagnosis import Bound

INT, FLOAT, TEXT, FLAG = pa.int64(), pa.float64(), pa.string(), pa.bool_()

NETWORK: dict[str, tuple[pa.DataType, str]] = {
    "network": (TEXT, "name in the settings; teacher is the teacher compared with itself"),
    "arch_id": (TEXT, "stable hash of the canonical arch"),
    "macs": (INT, "multiply-accumulates of one image"),
    "params": (INT, "trained numbers"),
}
TERMS = ("loss_gap", "alignment", "student_linearity", "teacher_linearity")
BOUND: dict[str, tuple[pa.DataType, str]] = {
    **NETWORK,
    "image": (INT, "place in the split"),
    "split": (TEXT, "test"),
    "norm": (TEXT, "norm of the perturbation"),
    "eps": (FLOAT, "pixel units of [0, 1]"),
    "loss_gap": (FLOAT, "nats, |l_S - l_T| at the image"),
    "alignment": (FLOAT, "nats, eps times the dual norm of the difference of the input gradients"),
    "student_linearity": (FLOAT, "nats, largest linearisation error found: a lower bound of the true maximum"),
    "teacher_linearity": (FLOAT, "nats, largest linearisation error found: a lower bound of the true maximum"),
    "left_student": (FLOAT, "nats, |l_S - l_T| where the student's loss is greatest"),
    "left_teacher": (FLOAT, "nats, |l_S - l_T| where the teacher's loss is greatest"),
    "left_difference": (FLOAT, "nats, |l_S - l_T| where it is greatest"),
    "left": (FLOAT, "nats, the largest of the three: a lower bound of the true maximum"),
    "right": (FLOAT, "nats, sum of the four terms"),
    "slack": (FLOAT, "nats, right minus left; negative only by rounding"),
    "student_loss": (FLOAT, "nats, at the image"),
    "teacher_loss": (FLOAT, "nats, at the image"),
    "gap_l1": (FLOAT, "nats per pixel unit, L1 norm of the difference of the input gradients"),
    "gap_l2": (FLOAT, "nats per pixel unit, L2 norm of the difference of the input gradients"),
    "cosine": (FLOAT, "of the angle between the input gradients"),
    "student_correct": (FLAG, "correct at the image"),
    "teacher_correct": (FLAG, "correct at the image"),
    "student_robust": (FLAG, "correct at the image and at every point that was found"),
    "teacher_robust": (FLAG, "correct at the image and at every point that was found"),
    "seed": (INT, "seed of the searches"),
}
RADII: dict[str, tuple[pa.DataType, str]] = {
    **NETWORK,
    "image": (INT, "place in the split"),
    "split": (TEXT, "test"),
    "method": (TEXT, "clever (an estimate) or smoothing (a certificate, of the smoothed network)"),
    "norm": (TEXT, "norm of the radius"),
    "sigma": (FLOAT, "pixel units, standard deviation of smoothing's noise"),
    "radius": (FLOAT, "pixel units in the norm; 0 where smoothing abstains"),
    "limit": (FLOAT, "pixel units, the largest radius that the method could have given"),
    "correct": (FLAG, "whether the class that the radius is computed for is the label"),
    "abstained": (FLAG, "smoothing found no class with a share above one half"),
    "margin": (FLOAT, "logits, of the target with CLEVER's smallest radius"),
    "lipschitz": (FLOAT, "logits per pixel unit, CLEVER's estimate of the largest dual norm of the margin's gradient"),
    "fit_p": (FLOAT, "P value of the Kolmogorov-Smirnov test of CLEVER's fit; null where all maxima are equal"),
    "share_low": (FLOAT, "lower confidence bound of the class's share under noise"),
    "samples": (INT, "gradients of one margin (CLEVER), noisy copies that certify (smoothing)"),
    "alpha": (FLOAT, "probability that smoothing's certificate is wrong"),
    "seed": (INT, "seed of the samples"),
}
SUMMARY: dict[str, tuple[pa.DataType, str]] = {
    **NETWORK,
    "quantity": (TEXT, "what was averaged over images"),
    "kind": (TEXT, "exact, lower bound, upper bound, estimate or certificate: relation to the true value"),
    "unit": (TEXT, "unit of value, low and high"),
    "norm": (TEXT, "norm of perturbation or radius"),
    "eps": (FLOAT, "pixel units, radius of the ball"),
    "sigma": (FLOAT, "pixel units, standard deviation of smoothing's noise"),
    "value": (FLOAT, "mean over images; for shares, the fraction"),
    "low": (FLOAT, "lower end of the 95 % interval: bootstrap over images, Wilson for shares"),
    "high": (FLOAT, "upper end of the 95 % interval"),
    "num_images": (INT, "images"),
    "seed": (INT, "seed of the run"),
}
P_VALUES = ("mcnemar_p", "gap_p", "nearer_robust_p")
PAIRS: dict[str, tuple[pa.DataType, str]] = {
    "first": (TEXT, "network"),
    "second": (TEXT, "network"),
    "norm": (TEXT, "norm of the perturbation"),
    "eps": (FLOAT, "pixel units of [0, 1]"),
    "gap": (TEXT, "norm of the gradient gap that is compared, dual to the perturbation's"),
    "num_images": (INT, "images, the same for both"),
    "first_only": (INT, "images on which only the first network is robust"),
    "second_only": (INT, "images on which only the second network is robust"),
    "mcnemar_p": (FLOAT, "exact two-sided P value of equal robust accuracy"),
    "first_nearer": (FLOAT, "fraction of images at which the first network's gradient is nearer to the teacher's"),
    "gap_p": (FLOAT, "two-sided P value of Wilcoxon's signed-rank test of equal gaps"),
    "nearer_robust": (FLOAT, "of images on which one network is robust: fraction where it has the smaller gap"),
    "nearer_robust_low": (FLOAT, "fraction, 95 % Wilson"),
    "nearer_robust_high": (FLOAT, "fraction, 95 % Wilson"),
    "nearer_robust_p": (FLOAT, "exact two-sided P value of a fraction of one half"),
    **{f"{name}_holm": (FLOAT, f"{name} after Holm's correction for all pairs at this radius") for name in P_VALUES},
    "seed": (INT, "seed of the run"),
}

# Mean over images of a column of BOUND: kind and unit, once per radius, then once for all.
AT_RADIUS = {
    "loss_gap": ("exact", "nats"),
    "alignment": ("exact", "nats"),
    "student_linearity": ("lower bound", "nats"),
    "teacher_linearity": ("lower bound", "nats"),
    "left": ("lower bound", "nats"),
    "left_student": ("lower bound", "nats"),
    "right": ("lower bound", "nats"),
    "slack": ("estimate", "nats"),
    "student_robust": ("upper bound", "fraction"),
    "teacher_robust": ("upper bound", "fraction"),
}
AT_IMAGE = {
    "gap_l1": ("exact", "nats per pixel unit"),
    "gap_l2": ("exact", "nats per pixel unit"),
    "cosine": ("exact", "cosine"),
    "student_correct": ("exact", "fraction"),
    "teacher_correct": ("exact", "fraction"),
}
KINDS = {"clever": "estimate", "smoothing": "certificate"}


def bound_rows(bound: Bound, *, first: int, **common: Any) -> list[dict[str, Any]]:
    """Rows of BOUND; `first` is the index of the first image, `common` holds values of all rows."""
    columns = {name: value for name, value in vars(bound).items() if name != "left"}
    columns |= {f"left_{name}": value for name, value in bound.left.items()}
    columns |= {"left": bound.right - bound.slack, "right": bound.right, "slack": bound.slack}
    values = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
    return [{**common, "image": first + place, **row} for place, row in enumerate(values.to_dict("records"))]


def clever_rows(found: Clever, correct: np.ndarray, *, first: int, **common: Any) -> list[dict[str, Any]]:
    """Rows of RADII; `correct` is true where the predicted class is the label."""
    values = pd.DataFrame({**vars(found), "correct": correct})
    shared = {**common, "method": "clever", "abstained": False}
    return [{**shared, "image": first + place, **row} for place, row in enumerate(values.to_dict("records"))]


def smoothing_row(found: Certificate, label: int, **common: Any) -> dict[str, Any]:
    """A row of RADII."""
    said = {"abstained": found.label == ABSTAIN, "correct": found.label == label}
    return {**common, "method": "smoothing", "radius": found.radius, "share_low": found.share_low, **said}


def summary_rows(bound: pd.DataFrame, radii: pd.DataFrame, *, seed: int) -> list[dict[str, Any]]:
    """Rows of SUMMARY of one network, from its rows of BOUND and of RADII."""
    network = {name: bound[name].iloc[0] for name in NETWORK}
    rows = []
    for (norm, eps), rows_at in bound.groupby(["norm", "eps"]):
        where = {"norm": norm, "eps": eps}
        rows += [{**where, **_summary(rows_at[name], name, *what)} for name, what in AT_RADIUS.items()]
    rows += [_summary(rows_at[name], name, *what) for name, what in AT_IMAGE.items()]
    for (method, norm, sigma), group in radii.groupby(["method", "norm", "sigma"], dropna=False):
        where, kind = {"norm": norm, "sigma": sigma}, KINDS[str(method)]
        counted = group["radius"].where(group["correct"], 0.0)
        rows.append({**where, **_summary(counted, f"{method}_radius", kind, "pixel units")})
        rows.append({**where, **_summary(group["correct"], f"{method}_correct", "exact", "fraction")})
        if method == "smoothing":
            rows.append({**where, **_summary(group["abstained"], "smoothing_abstained", "exact", "fraction")})
    return [{**network, **row, "seed": seed} for row in rows]


def _summary(values: pd.Series, quantity: str, kind: str, unit: str) -> dict[str, Any]:
    """Mean over images and its interval."""
    if unit == "fraction":
        low, high = wilson(int(values.sum()), len(values))
        mean = float(values.mean())
    else:
        mean, low, high = mean_interval(values.to_numpy(float))
    found = {"value": mean, "low": low, "high": high, "num_images": len(values)}
    return {"quantity": quantity, "kind": kind, "unit": unit, **found}


def pair_rows(bounds: Mapping[str, pd.DataFrame], *, gap: str, seed: int) -> list[dict[str, Any]]:
    """Rows of PAIRS: every pair of networks, at every radius at which both were diagnosed.

    The P values are given twice: of the pair alone, and corrected by Holm's method for all pairs at the same radius.

    Parameters
    ----------
    bounds : mapping of str to DataFrame
        Rows of BOUND by network.
    gap : {'gap_l1', 'gap_l2'}
        Which gradient gap is compared.
    """
    rows_of_pairs: list[dict[str, Any]] = []
    for first, second in combinations(bounds, 2):
        both = bounds[first].merge(bounds[second], on=["image", "norm", "eps"], suffixes=("_1", "_2"))
        for (norm, eps), rows in both.groupby(["norm", "eps"]):
            names = ("student_robust_1", "student_robust_2", f"{gap}_1", f"{gap}_2")
            found = asdict(pairing(*(rows[name].to_numpy() for name in names)))
            where = {"first": first, "second": second, "norm": norm, "eps": eps, "gap": gap, "num_images": len(rows)}
            rows_of_pairs.append({**where, **found, "seed": seed})
    families: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows_of_pairs:
        families.setdefault((row["norm"], row["eps"]), []).append(row)
    for family in families.values():
        for name in P_VALUES:
            corrected = holm(np.asarray([row[name] for row in family]))
            for row, value in zip(family, corrected.tolist(), strict=True):
                row[f"{name}_holm"] = value
    return rows_of_pairs
