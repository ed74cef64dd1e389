"""The model card: the student's use, its input and output, the attacks and accuracies, its limits."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pandas as pd
import torch

from proard import __version__
from proard.config import OBJECTIVE_WORDS
from proard.data import preprocess
from proard.export.formats import OLDEST_RUNTIME, StudentFacts
from proard.export.trust import Trust, percent_interval

HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
ACCOUNTING = {
    "any_iterate": "an image counts as misclassified if any iterate of any restart is",
    "last_iterate": "an image counts as misclassified if the last iterate of any restart is",
}
REACH = {  # by norm
    "linf": "every pixel by at most eps = {eps} (linf)",
    "l2": "all pixels together by a Euclidean length of at most eps = {eps} (l2)",
}
HUB_LICENSES = {"unspecified": "unknown"}
LISTED_CLASSES = 20
WITHOUT = Trust()

TEXT = """\
# {name}

An image classifier for small devices that was trained to withstand adversarial perturbations.

| | |
|---|---|
{asked}
| Multiply-accumulates of one image | {macs:,} (tools that count FLOPs often say twice that) |
| Parameters (before batch norm is folded) | {params:,} |
{footprint}| Clean accuracy, test | {clean_acc} |
{robust}
| Threat model | {norm}, eps {eps}, white box |
| Classes | {num_classes} |
| Arch | `{arch_id}` of space `{space}`: `{arch}` |

Accuracies are measured, not predicted, and given with their 95 % Wilson intervals.

## Intended use

Classifying {channels} images of {side} x {side} pixels that resemble `{dataset}` into: {class_list}.
It suits edge devices whose inputs an adversary may change slightly, and comparisons of robust networks. It is not
a safety component: see the limits below.

| | |
|---|---|
| Input | `{input}`, values in [0, 1] |
| Normalisation | inside the network: do **not** normalise |
| Output | `{output}` |
| ONNX | `student.onnx`, one file, any batch size; opset {opset}, for {runtimes} |
| PyTorch | `student.pt2` (torch.export), or `proard.load_student("FOLDER")`, a module with its preprocessing |
| Checksums | `sha256sum -c SHA256SUMS` |

Class names, arch, costs and threat model are also in the metadata properties of the ONNX file.

## Example

Needs numpy, Pillow (10.1 or newer) and onnxruntime; `python example.py FILE ...` prints a class for each image file.
`preprocess` is a copy of the function that made the images of training and test.

```python
import json
import sys
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


{preprocess}

session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
for path in sys.argv[1:]:
    pixels = preprocess(Image.open(path), {side}, "{mode}").reshape({side}, {side}, {image_channels})
    images = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32) / 255
    (logits,) = session.run(["logits"], {{"images": images}})
    scores = np.exp(logits[0] - logits.max())
    print(path, classes[scores.argmax()], round(float(scores.max() / scores.sum()), 4))
```

## Threat model and measured accuracy

The adversary knows the network and changes {reach}; pixels stay in [0, 1].
Attacks are projected gradient descent with random starts on this very network, its batch norm folded at recalibrated
statistics; {accounting}.

| split | role | attack | what | images | clean accuracy | robust accuracy |
|---|---|---|---|---|---|---|
{rows}

{rows_from}
{trust}
## The files are the measured network

`student.onnx` ran in onnxruntime over all {num_images:,} test images: accuracy {onnx_test_accuracy:.4%} (the selected
row: {selected_row_clean_acc:.4%}), the same class as PyTorch on {onnx_top1_agreement:.4%} of them, class
probabilities within {onnx_max_softmax_difference:.1e}. On {adv_images:,} attacked test images: the same class on
{adv_agreement:.4%}, within {adv_difference:.1e}. `student.pt2`: within {pt2_max_softmax_difference:.1e}.
Details: `parity.json`.

Sizes: {sizes}. One image on one CPU thread ({runtime}; {machine}): median {median_ms:.2f} ms, 95th percentile
{p95_ms:.2f} ms over {runs} runs, for orientation only.

## Training

{made}

| | |
|---|---|
| Data | `{dataset}`: {counts} images |
| Run, seed | `{run}`, {seed} |
{source}
| Settings of export and measurement | sha256 `{settings_sha256}` |
| Versions | {versions} |
| License | {license} |

## Limits

- Robust accuracy under attacks is an upper bound: a stronger attack may lower it, and nothing here is certified.
- It holds for {norm} perturbations up to {eps} only: not for larger ones, other norms, patches, rotations,
  blur, noise, weather or a changed camera, none of which was measured.
- It was measured on {num_images:,} test images of `{dataset}`; the intervals cover the choice of such images only.
- Images of anything else still get one of the {num_classes} classes; probabilities were not calibrated.
- The numbers are for float32. A quantised or otherwise changed network must be measured again.
"""

FOOTPRINT_WORDS = {
    "flash": ("Weights, float32", " bytes"),
    "sram": ("Peak of the activations of one image by liveness, float32: a lower bound", " bytes"),
    "arena": ("Block in which onnxruntime places these activations, without scratch memory", " bytes"),
    "latency": ("Latency of `FILE`, predicted for DEVICE", " ms"),
}
FROM_SUPERNET = {
    "asked": "| Budget asked for | `{budget}` |",
    "rows_from": """\
Each line is a row of `student.parquet` (stage `select_student`): the one with `arch_id` {arch_id} and this split, role
and attack. This student was chosen on `val`, so its `val` numbers are slightly favourable; `test` chose nothing.""",
    "made": """\
The weights are a subnet of one supernet, trained by robust distillation; nothing was fine-tuned afterwards.
Batch-norm statistics were recalibrated on training images for this subnet.""",
    "source": "| Supernet | weights `{supernet}`, last phase `{phase}`, made by proard {supernet_version} |",
}
TRAINED_ALONE = {
    "asked": "| Student | `{budget}` |",
    "rows_from": """\
Each line is a row of this training's `outcomes.parquet` (stage `measure_experiment`). Its epoch was chosen on `val`;
`test` chose nothing.""",
    "made": """\
The network was trained by itself, as `experiment` in the settings says; batch-norm statistics, where it has any,
were recalibrated on training images.""",
    "source": "| Trained weights | `{supernet}`, made by proard {supernet_version} |",
}


def model_card(
    facts: StudentFacts,
    rows: pd.DataFrame,
    *,
    attacks: Sequence[Mapping[str, Any]],
    parity: Mapping[str, Any],
    supernet: Mapping[str, Any],
    counts: Mapping[str, int],
    opset: int,
    origin: Mapping[str, str] = FROM_SUPERNET,
    trust: Trust = WITHOUT,
) -> str:
    """Text of `card.md`, with front matter for model hubs.

    Parameters
    ----------
    rows : DataFrame
        Rows of `student.parquet` that measure this student, in the order of the table.
    attacks : sequence of mapping
        Settings of the attacks that `select_student` ran, with their objectives.
    parity : mapping
        Contents of `parity.json`.
    supernet : mapping
        Header of the supernet's file, or of the trained student's.
    counts : mapping of str to int
        Images per split.
    opset : int
        Of the ONNX file.
    origin : mapping
        Sentences on the origin of the weights: `FROM_SUPERNET` or `TRAINED_ALONE`.
    trust : Trust
        Results of AutoAttack and of the checks, where these stages ran. Robust accuracy under AutoAttack comes first.
    """
    worst = _hardest(rows[rows["split"] == "test"])
    header, adversarial, made = facts.to_header(), parity["adversarial"], supernet.get("provenance", {})
    grey = facts.space.settings.image_channels == 1
    phases = made.get("settings", {}).get("train_phase", {}).get("phases", [{}])
    objectives = {attack["name"]: OBJECTIVE_WORDS[attack["objective"]] for attack in attacks}
    oldest = OLDEST_RUNTIME.get(opset)
    further = f", ... ({len(facts.classes)} in all)" if len(facts.classes) > LISTED_CLASSES else ""
    values = {
        **header,
        **parity,
        **parity["latency"],
        "clean_acc": percent_interval(worst, "clean_acc"),
        "robust": trust.headline((_called(worst), percent_interval(worst, "robust_acc"))),
        "trust": trust.sections(),
        "norm": facts.threat.norm,
        "reach": REACH[facts.threat.norm].format(eps=_eps(facts.threat.eps)),
        "eps": _eps(facts.threat.eps),
        "num_classes": len(facts.classes),
        "class_list": ", ".join(facts.classes[:LISTED_CLASSES]) + further,
        "opset": opset,
        "runtimes": f"onnxruntime {oldest} or newer" if oldest else "an onnxruntime that knows this opset",
        "space": facts.space.settings.name,
        "side": facts.space.settings.image_size,
        "image_channels": facts.space.settings.image_channels,
        "channels": facts.channel_order,
        "mode": "L" if grey else "RGB",
        "preprocess": inspect.getsource(preprocess),
        "accounting": ACCOUNTING[rows["accounting"].iloc[0]],
        "rows": "\n".join(_row(row, objectives) for _, row in rows.iterrows()),
        "adv_images": adversarial["num_images"],
        "adv_agreement": adversarial["onnx_top1_agreement"],
        "adv_difference": adversarial["onnx_max_softmax_difference"],
        "sizes": ", ".join(f"`{name}` {size / 1e3:,.0f} kB" for name, size in parity["bytes"].items()),
        "counts": ", ".join(f"{number:,} {split}" for split, number in counts.items()),
        "supernet": supernet["checksum"][:16],
        "supernet_version": made.get("version", "(unknown)"),
        "phase": phases[-1].get("name", "(unknown)"),
        "settings_sha256": header["settings_sha256"][:16],
        "versions": f"proard {__version__}, torch {torch.__version__}, onnx {onnx.__version__}, "
        f"onnxruntime {onnxruntime.__version__}",
    }
    values["footprint"] = "".join(
        f"| {words} | {header[name]:,.4g}{unit} |\n" if name == "latency" else f"| {words} | {header[name]:,}{unit} |\n"
        for name, (words, unit) in FOOTPRINT_WORDS.items()
        if name in header
    )
    values["footprint"] = values["footprint"].replace("DEVICE", Path(facts.device or "").stem)
    values["footprint"] = values["footprint"].replace("FILE", facts.latency_file)
    values |= {name: sentence.format(**values) for name, sentence in origin.items()}
    return _front_matter(facts, worst, trust) + TEXT.format(**values)


def _hardest(test: pd.DataFrame) -> pd.Series:
    """The worst case over all attacks if the table has it, else the attack with the lowest robust accuracy."""
    over_all = test[test["attack"] == "worst"]
    return test.sort_values("robust_acc").iloc[0] if over_all.empty else over_all.iloc[0]


def _front_matter(facts: StudentFacts, worst: pd.Series, trust: Trust) -> str:
    """Metadata for model hubs; texts of users are written as JSON, which is valid YAML."""
    hub_name = HUB_DATASETS.get(facts.dataset)
    threat, final = f"{facts.threat.norm} {_eps(facts.threat.eps)}", trust.final
    metrics = [("Clean accuracy", worst["clean_acc"])]
    if final is not None:
        metrics.append((f"Robust accuracy, {threat}, AutoAttack", final["robust_acc"]))
    metrics.append((f"Robust accuracy, {threat}, {_called(worst)}", worst["robust_acc"]))
    lines = [
        "---",
        f"license: {json.dumps(HUB_LICENSES.get(facts.license, facts.license))}",
        "library_name: onnx",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {tag}" for tag in ("image-classification", "adversarial-robustness", "edge", "onnx", "proard")),
        *([f"datasets:\n- {hub_name}"] if hub_name else []),
        "metrics:",
        "- accuracy",
        "model-index:",
        f"- name: {json.dumps(facts.name)}",
        "  results:",
        "  - task:",
        "      type: image-classification",
        "    dataset:",
        f"      name: {facts.dataset}",
        f"      type: {hub_name or facts.dataset}",
        "      split: test",
        "    metrics:",
    ]
    for name, value in metrics:
        lines += ["    - type: accuracy", f"      name: {json.dumps(name)}", f"      value: {value:.4f}"]
    return "\n".join([*lines, "---", "", ""])


def _row(row: pd.Series, objectives: Mapping[str, str]) -> str:
    """A measurement as a line of the card's table."""
    what = "worst case per image over the attacks of this split"
    if row["attack"] != "worst":
        restarts = f"{row['restarts']:.0f} restart" + ("s" if row["restarts"] > 1 else "")
        lengths = dict.fromkeys(_eps(row[name]) for name in ("step_size", "last_step_size") if pd.notna(row.get(name)))
        what = f"{row['num_steps']:.0f} steps of {' to '.join(lengths)}, {restarts}"
        if pd.notna(row.get("targets")):
            what += f", {row['targets']:.0f} targets in turn, on the images that earlier attacks left"
        what = ", ".join(part for part in (objectives.get(row["attack"]), what) if part)
    cells = [row["split"], row["role"], row["attack"], what, f"{row['num_images']:,}"]
    return "| " + " | ".join([*cells, percent_interval(row, "clean_acc"), percent_interval(row, "robust_acc")]) + " |"


def _called(row: pd.Series) -> str:
    """Name of an attack in a headline."""
    return "worst case of all attacks" if row["attack"] == "worst" else row["attack"]


def _eps(value: float) -> str:
    """A pixel length as n/255."""
    return f"{value * 255:.4g}/255"
