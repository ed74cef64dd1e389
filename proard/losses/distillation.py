"""Losses of (robust) distillation: student and teacher logits in, one number out.

No gradient flows into a teacher. Every KL is summed over classes and averaged over images; the released code of most
papers averages over classes as well, which makes its values, and the learning rates tuned with them, 10 or 100 times
smaller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.losses.divergence import alpha_divergence, kl_to_teacher, softened_kl
from proard.losses.objectives import OBJECTIVES, Batch, Objective


def kd_loss(
    clean: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    soft_weight: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Soft labels of the teacher and hard labels on clean images: KD, AKD and ARD differ in who is asked where.

    Parameters
    ----------
    clean : Tensor of shape (batch, classes)
        Student logits on the clean images, for the hard labels.
    student, teacher : Tensor of shape (batch, classes)
        The pair that is compared: KD at clean images, ARD the student's adversarial with the teacher's clean ones, AKD
        (the KDIGA paper's) both at adversarial images.
    labels : Tensor of shape (batch,)
        Class indices.
    soft_weight : float in [0, 1]
        Share of the soft labels (the papers' alpha).
    temperature : float
        Temperature tau of the soft labels.

    Returns
    -------
    Tensor of shape ()
        alpha tau^2 KL(teacher_tau || student_tau) + (1 - alpha) CE(clean, y), nats, averaged over images.

    Notes
    -----
    ARD's defaults are those of its code, alpha 1 and tau 30, which leave no hard label; KD's and AKD's those of the
    KDIGA code, alpha 0.5 and tau 1.

    References
    ----------
    Hinton et al., arXiv:1503.02531. Goldblum et al., Adversarially Robust Distillation, AAAI 2020, arXiv:1905.09747.
    Shao et al., arXiv:2110.12072, for AKD.
    """
    soft = softened_kl(student, teacher.detach(), temperature=temperature).mean()
    return soft_weight * soft + (1 - soft_weight) * F.cross_entropy(clean, labels)


def fast_edge_loss(clean: Tensor, adv: Tensor, teacher: Tensor, labels: Tensor, *, beta: float = 1.0) -> Tensor:
    """Soft labels on clean images and hard labels on adversarial ones: fast edge distillation as its paper prints it.

    Parameters
    ----------
    clean, adv : Tensor of shape (batch, classes)
        Student logits on the clean images and on images that were perturbed against the teacher.
    teacher : Tensor of shape (batch, classes)
        Teacher logits on the clean images.
    labels : Tensor of shape (batch,)
        Class indices.
    beta : float
        Weight of the adversarial term (the paper's lambda).

    Returns
    -------
    Tensor of shape ()
        CE(s(x), softmax t(x)) + lambda CE(s(x'), y), nats, averaged over images.

    Notes
    -----
    Algorithm 1, with `attack.crafted_on: teacher` and one step of eps from the image itself (FGSM). The notebooks of
    the paper ran another loss: ARD's at temperature 30, attacked on the student.
    """
    return F.cross_entropy(clean, teacher.detach().softmax(1)) + beta * F.cross_entropy(adv, labels)


def trust(teacher_adv: Tensor, labels: Tensor, *, trust_power: float = 0.1) -> Tensor:
    """How far the teacher is right at the adversarial images: p_y(x')^power in [0, 1], of shape (batch,)."""
    return teacher_adv.detach().softmax(1).gather(1, labels[:, None])[:, 0] ** trust_power


def iad_loss(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    labels: Tensor,
    trusted: Tensor,
    *,
    soft_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """The teacher's soft labels, and the student's own where the teacher is not to be trusted.

    Parameters
    ----------
    clean, adv : Tensor of shape (batch, classes)
        Student logits; the gradient flows through both.
    teacher : Tensor of shape (batch, classes)
        Teacher logits on the clean images (IAD) or on the adversarial ones (AdaIAD).
    labels : Tensor of shape (batch,)
        Class indices.
    trusted : Tensor of shape (batch,)
        `trust` of the teacher, 1 during the first phase of training (60 of 200 epochs).
    soft_weight : float in [0, 1]
        Share of both divergences (the code's alpha).
    temperature : float
        Temperature of the teacher's term: 1 for IAD, 30 in the code of AdaIAD.

    Returns
    -------
    Tensor of shape ()
        alpha (tau^2 KL(t_tau || s_tau(x')) + (1 - trusted) KL(s(x) || s(x'))) + (1 - alpha) CE(s(x), y), nats,
        averaged over images.

    Notes
    -----
    As the authors' code; the paper's formula also multiplies the teacher's term by `trusted`.

    References
    ----------
    Zhu et al., Reliable Adversarial Distillation with Unreliable Teachers, ICLR 2022, arXiv:2106.04928 (IAD-I).
    Huang et al., Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023.
    """
    from_teacher = softened_kl(adv, teacher.detach(), temperature=temperature)  # (batch,)
    from_itself = (1 - trusted) * kl_to_teacher(adv, clean)
    return soft_weight * (from_teacher + from_itself).mean() + (1 - soft_weight) * F.cross_entropy(clean, labels)


def rslad_loss(
    student_clean: Tensor, student_adv: Tensor, teacher_clean: Tensor, *, adv_weight: float = 5 / 6
) -> Tensor:
    """Pull clean and adversarial student outputs to the teacher's clean soft labels.

    Parameters
    ----------
    student_clean, student_adv : Tensor of shape (batch, classes)
        Student logits on the clean and on the adversarial images.
    teacher_clean : Tensor of shape (batch, classes)
        Teacher logits on the clean images. No gradient flows into them.
    adv_weight : float in [0, 1]
        Share of the adversarial term.

    Returns
    -------
    Tensor of shape ()
        KL(teacher || student) in nats, summed over classes, averaged over images.

    Notes
    -----
    The authors' code also averages over classes: its values are smaller by that factor.

    References
    ----------
    Zi et al., Revisiting Adversarial Robustness Distillation, ICCV 2021, arXiv:2108.07969.
    """
    teacher = teacher_clean.detach()
    clean, adv = kl_to_teacher(student_clean, teacher), kl_to_teacher(student_adv, teacher)  # (batch,)
    return (adv_weight * adv + (1 - adv_weight) * clean).mean()


def adaad_loss(
    student_clean: Tensor, student_adv: Tensor, teacher_clean: Tensor, teacher_adv: Tensor, *, adv_weight: float = 1.0
) -> Tensor:
    """Pull the student to the teacher's outputs at the same images, clean and adversarial.

    Parameters
    ----------
    student_clean, student_adv, teacher_clean, teacher_adv : Tensor of shape (batch, classes)
        Logits; none flows into the teacher's here. The attack ascends KL(teacher(x') || student(x')) through both.
    adv_weight : float in [0, 1]
        Share of the adversarial term (the paper's alpha, 1 in its code).

    Returns
    -------
    Tensor of shape ()
        alpha KL(t(x') || s(x')) + (1 - alpha) KL(t(x) || s(x)), nats, averaged over images.

    Notes
    -----
    The authors' code averages over classes on CIFAR-10 and sums on CIFAR-100.

    References
    ----------
    Huang et al., Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023.
    """
    adv = kl_to_teacher(student_adv, teacher_adv.detach())
    clean = kl_to_teacher(student_clean, teacher_clean.detach())
    return (adv_weight * adv + (1 - adv_weight) * clean).mean()


def alpha_loss(
    student_clean: Tensor,
    student_adv: Tensor,
    teacher_clean: Tensor,
    *,
    adv_weight: float = 5 / 6,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    ratio_clip: float = 5.0,
) -> Tensor:
    """Adaptive alpha-divergence to the teacher's clean outputs: of two alphas the larger divergence, image by image.

    Parameters
    ----------
    student_clean, student_adv, teacher_clean : Tensor of shape (batch, classes)
        Logits; none flows into the teacher's.
    adv_weight : float in [0, 1]
        Share of the adversarial term; 0 is AlphaNet's own loss.
    alpha_min, alpha_max : float
        The two alphas: one punishes overestimation by the student, one underestimation.
    ratio_clip : float
        Largest importance weight.

    Returns
    -------
    Tensor of shape ()
        w max_alpha D(t(x) || s(x')) + (1 - w) max_alpha D(t(x) || s(x)), averaged over images.

    Notes
    -----
    AlphaNet trains without an adversary; the adversarial term and its share are RSLAD's. It also clips gradients at 1,
    which is the training's setting here (`clip_norm`), not the loss's.

    References
    ----------
    Wang et al., AlphaNet: Improved Training of Supernets with Alpha-Divergence, ICML 2021, arXiv:2102.07954.
    """

    def larger(student: Tensor) -> Tensor:
        low, high = (
            alpha_divergence(student, teacher_clean, alpha=alpha, ratio_clip=ratio_clip)
            for alpha in (alpha_min, alpha_max)
        )
        return torch.where(low > high, low, high)

    return (adv_weight * larger(student_adv) + (1 - adv_weight) * larger(student_clean)).mean()


# --- the objectives of training -------------------------------------------------------------------------------------


def _trusted(batch: Batch, trust_power: float, trust_after: float) -> Tensor:
    """IAD's trust, 1 before `trust_after` of the training."""
    if batch.progress < trust_after:
        return torch.ones_like(batch.teacher_adv[:, 0])
    return trust(batch.teacher_adv, batch.labels, trust_power=trust_power)


def _iad(batch: Batch, *, teacher: Tensor, trust_power: float, trust_after: float, **options: float) -> Tensor:
    """IAD and AdaIAD."""
    trusted = _trusted(batch, trust_power, trust_after)
    return iad_loss(batch.clean, batch.adv, teacher, batch.labels, trusted, **options)


def _adaad(batch: Batch, *, adv_weight: float) -> Tensor:
    """AdaAD; nothing at clean images where they have no weight."""
    if adv_weight == 1:
        return kl_to_teacher(batch.adv, batch.teacher_adv.detach()).mean()
    return adaad_loss(batch.clean, batch.adv, batch.teacher, batch.teacher_adv, adv_weight=adv_weight)


OBJECTIVES.update(
    {
        "kd": Objective(
            None,
            lambda batch, **options: kd_loss(batch.clean, batch.clean, batch.teacher, batch.labels, **options),
            frozenset({"clean", "teacher"}),
        ),
        "akd": Objective(
            "ce",
            lambda batch, **options: kd_loss(batch.clean, batch.adv, batch.teacher_adv, batch.labels, **options),
            frozenset({"clean", "adv", "teacher_adv"}),
        ),
        "ard": Objective(
            "ce",
            lambda batch, **options: kd_loss(batch.clean, batch.adv, batch.teacher, batch.labels, **options),
            frozenset({"clean", "adv", "teacher"}),
        ),
        "iad": Objective(
            "ce",
            lambda batch, **options: _iad(batch, teacher=batch.teacher, **options),
            frozenset({"clean", "adv", "teacher", "teacher_adv"}),
        ),
        "rslad": Objective(
            "kl_teacher",
            lambda batch, adv_weight: rslad_loss(batch.clean, batch.adv, batch.teacher, adv_weight=adv_weight),
            frozenset({"clean", "adv", "teacher"}),
        ),
        "adaad": Objective(
            "kl_teacher_adv",
            _adaad,
            frozenset({"clean", "adv", "teacher", "teacher_adv"}),
            unweighted=lambda adv_weight: frozenset({"clean", "teacher"}) if adv_weight == 1 else frozenset(),
        ),
        "adaiad": Objective(
            "kl_teacher_adv",
            lambda batch, **options: _iad(batch, teacher=batch.teacher_adv, **options),
            frozenset({"clean", "adv", "teacher_adv"}),
        ),
        "alpha": Objective(
            "kl_teacher",
            lambda batch, **options: alpha_loss(batch.clean, batch.adv, batch.teacher, **options),
            frozenset({"clean", "adv", "teacher"}),
        ),
        "fast_edge": Objective(
            "ce",
            lambda batch, beta: fast_edge_loss(batch.clean, batch.adv, batch.teacher, batch.labels, beta=beta),
            frozenset({"clean", "adv", "teacher"}),
        ),
    }
)
