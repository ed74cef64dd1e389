"""The int8 part of a student's card, from the table of `quantize_student` alone."""

from __future__ import annotations

import pandas as pd

TEXT = """\
## The int8 file

`{file}` ({kilobytes:,.0f} kB; float32: {float_kilobytes:,.0f} kB) takes the same float images in [0, 1] and gives
float logits. Weights are int8 per channel, activations {activations}.
The input has scale 1/255: 8-bit pixels lose nothing. Ranges were calibrated on the first {calibration_images:,.0f}
images of train (in the order of seed {calibration_seed:.0f}). Way to quantise: `{variant}`, chosen on val.
{trained}
| | float32 | int8 | difference, 95 % interval | images lost / gained |
|---|---|---|---|---|
{rows}

On {num_images:,} test images, {norm}, eps {eps:.4g}, scored by the runtime. Both precisions were attacked alike:
{attacks}. `union`: an image counts as robust only if it is classified correctly under all of them.
Attacks on int8 differentiate a twin that computes the file's integers. Twin and runtime give the same class on
{agreement_clean:.2%} of the clean and {agreement_adversarial:.2%} of the attacked images; the largest difference of a
logit is {max_logit_difference:.2g}.

An int8 file is not one network: integer kernels differ between runtimes and processors. These figures are of
{runtime} on {cpu} ({cpu_flags}). One image on one thread there: {float_ms:.3f} ms in
float32, {int8_ms:.3f} ms in int8, for orientation only. Measure again on your device.
"""
UNSIGNED = "uint8, with weights of 7 bits, so that no sum saturates on a processor without VNNI"
TRAINED = """\
The weights are not those of the float file: they were trained further under attack, as int8 rounds them, on images of
train, with the float student as teacher.
"""
WORDS = {
    "worst": "robust, white box",
    "union": "robust, union of all attacks",
    "rounded": "robust, pixels on the 8-bit grid",
}


def int8_block(table: pd.DataFrame) -> str:
    """Markdown that describes an int8 student.

    Parameters
    ----------
    table : DataFrame
        Rows of `quantize_student/BUDGET/table.parquet`, columns `QUANTISED`.
    """
    test = table[table["split"] == "test"]
    in_float = test[test["precision"] == "float32"].set_index("attack")
    in_int8 = test[test["precision"] == "int8"].set_index("attack")
    union = in_int8.loc["union"]
    union_float = in_float.loc["union"]
    rows = [
        f"| clean | {union_float['clean_acc']:.2%} | {union['clean_acc']:.2%} | {100 * union['clean_difference']:+.2f} "
        f"points | {union['clean_lost']:.0f} / {union['clean_gained']:.0f} |"
    ]
    for attack, words in WORDS.items():
        before, after = in_float.loc[attack], in_int8.loc[attack]
        points = [f"{100 * after[f'difference{end}']:+.2f}" for end in ("", "_low", "_high")]
        cells = [words, f"{before['robust_acc']:.2%}", f"{after['robust_acc']:.2%}"]
        cells += ["{} points ({} to {})".format(*points), f"{after['lost']:.0f} / {after['gained']:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return TEXT.format(
        **{name: value for name, value in union.items() if name not in ("clean", "robust", "attacks")},
        activations="int8" if "signed" in union["variant"] else UNSIGNED,
        trained=TRAINED if "trained" in union["variant"] else "",
        kilobytes=union["bytes"] / 1e3,
        float_kilobytes=union_float["bytes"] / 1e3,
        float_ms=union_float["latency_ms"],
        int8_ms=union["latency_ms"],
        rows="\n".join(rows),
        attacks=", ".join(name for name in in_int8.index if name not in ("worst", "union")),
    )
