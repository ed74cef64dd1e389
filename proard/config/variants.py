"""Experiments: the supernet trained in several named ways with several seeds, measured alike and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from proard.config.attacks import Attack
from proard.config.fields import ConfigError, Count, Int, Natural, NonNegative, Settings, names_differ
from proard.config.settings import TrainPhase, merge

VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Seeds = Annotated[tuple[Natural, ...], Field(min_length=1)]


class TrainVariant(Settings):
    """Named variants of `train_phase`, each trained with each of the seeds.

    A variant lists what differs from `train_phase`. Its keys win over the shared keys and over every phase's own; where
    it has `phases`, these replace the list, and the keys beside them are their shared defaults. What is measured is
    the supernet of its last phase. All variants of a run share data and teacher.
    """

    seeds: Seeds = (0, 1, 2)
    variants: dict[VariantName, TrainPhase] = Field(default_factory=dict)

    @model_validator(mode="after")
    def seeds_differ(self) -> TrainVariant:
        """A seed's number is its folder."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds need different numbers; they are {list(self.seeds)}")
        return self


class MeasureVariant(Settings):
    """What is measured of each variant: `num_archs` of `sample_archs`, evenly spread over MACs, both ends included.

    `attack` on `num_val_images` of val serves choices between variants; `test_attacks` on `num_test_images` of test,
    and their worst case, are only reported. Images, noise and archs are the same for all.
    """

    num_archs: Annotated[Int, Field(ge=2)] = 12
    num_val_images: Count | None = 1000
    attack: Attack = Attack()
    num_test_images: Count | None = 1000
    test_attacks: Annotated[tuple[Attack, ...], Field(min_length=1)] = (
        Attack(),
        Attack(name="cw50x2", objective="margin", num_steps=50, restarts=2),
    )

    distinct: ClassVar[Any] = names_differ("test_attacks", "worst")


class CompareVariants(Settings):
    """Gains are over `baseline` (by default the first variant); `bootstraps` redraws of the images.

    Variants whose gradient evaluations differ by more than the share `tolerance` are refused: give them the same
    `forward_equivalents`.
    """

    baseline: str | None = None
    bootstraps: Count = 1000
    tolerance: NonNegative = 0.02


def expand_variants(train_phase: Mapping[str, Any], variants: Mapping[str, Any]) -> dict[str, Any]:
    """Every variant's `train_phase` section in full, before validation.

    Parameters
    ----------
    train_phase : mapping
        The run's section as written.
    variants : mapping
        By name, what differs; None for nothing.

    Returns
    -------
    dict
        By name, a section with `phases`, to be validated as `TrainPhase`.

    Raises
    ------
    ConfigError
        A variant is no mapping of keys.
    """
    expanded = {}
    for name, changes in variants.items():
        changes = {} if changes is None else changes
        if not isinstance(changes, Mapping):
            raise ConfigError(f"train_variant.variants.{name} is {changes!r}; expected: keys of train_phase")
        own = {key: value for key, value in changes.items() if key != "phases"}
        shared = {key: value for key, value in train_phase.items() if key != "phases"}
        phases = changes.get("phases", train_phase.get("phases", [{"name": "all"}]))
        if "phases" not in changes:
            phases = [merge(dict(phase), own) if isinstance(phase, Mapping) else phase for phase in phases]
        expanded[name] = {**merge(shared, own), "phases": phases}
    return expanded
