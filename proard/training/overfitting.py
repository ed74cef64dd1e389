"""Catastrophic overfitting: a network that is robust to the attack of its training and to no stronger one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proard.config import TrainingAttack, Validation

RATIO = 0.5  # accuracy under PGD relative to that under the training's own attack, below which training has failed
MARGIN = 0.1  # accuracies nearer than this are within the noise of a few hundred images


def overfitting(rows: Sequence[Mapping[str, Any]], rule: Validation, attack: TrainingAttack) -> str | None:
    """What to tell the user where the newest validation shows catastrophic overfitting, else None.

    Parameters
    ----------
    rows : sequence of mappings
        HISTORY rows, the newest epoch last. Rows without `val_train_attack_acc` were not watched.
    rule : Validation
        What is measured, and the action. Accuracies are means over the validated subnets.
    attack : TrainingAttack
        Named in the text.

    Returns
    -------
    str or None

    Notes
    -----
    A network that overfits in this way keeps or gains accuracy under its own attack while PGD brings it to zero within
    an epoch. A weak attack alone leaves a gap as well; hence the ratio, and at least 0.1 between the two.

    References
    ----------
    Wong et al., Fast is better than free, ICLR 2020, arXiv:2001.03994, section 5.4;
    Andriushchenko and Flammarion, Understanding and Improving Fast Adversarial Training, NeurIPS 2020,
    arXiv:2007.02617.
    """
    newest = [row for row in rows if row["epoch"] == rows[-1]["epoch"] and "val_train_attack_acc" in row]
    if rule.watch(attack) == "off" or not newest:
        return None
    own, pgd = (sum(row[name] for row in newest) / len(newest) for name in ("val_train_attack_acc", "val_robust_acc"))
    if pgd >= RATIO * own or own - pgd < MARGIN:
        return None
    kept = next((row["epoch"] for row in rows if row["best"]), None)
    text = (
        f"catastrophic overfitting at epoch {newest[0]['epoch']}: {own:.1%} of the validation images are robust to "
        f"the training's own attack, {pgd:.1%} to PGD-{rule.num_steps}"
    )
    if rule.watch(attack) == "stop":
        return f"{text}; the training ends here, with its best weights, those of epoch {kept}"
    noise = "attack.start n_fgsm or " if attack.num_steps <= 2 else ""
    return f"{text}; {noise}more attack.num_steps would avoid it"
