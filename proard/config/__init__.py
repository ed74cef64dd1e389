"""Settings of a run: one frozen class per stage, strict parsing, and the JSON schema generated from them."""

from proard.config.attacks import Attack, Curriculum, Threat, TrainingAttack
from proard.config.fields import ConfigError, UserError
from proard.config.presets import PRESETS
from proard.config.run import EXPERIMENTS, NEEDS, RunConfig, job_settings, json_schema, load, parse
from proard.config.settings import (
    Augmentation,
    EvaluateArchs,
    ExportStudent,
    FitPredictor,
    Measurement,
    Phase,
    PrepareData,
    Report,
    SampleArchs,
    SearchFront,
    SelectStudent,
    TrainControl,
    TrainPhase,
    TrainTeacher,
    Validation,
    VerifyFront,
)
from proard.config.spaces import Final, Space, Stem, Unit
from proard.config.variants import CompareVariants, MeasureVariant, TrainVariant

__all__ = [
    "EXPERIMENTS",
    "NEEDS",
    "PRESETS",
    "Attack",
    "Augmentation",
    "CompareVariants",
    "ConfigError",
    "Curriculum",
    "EvaluateArchs",
    "ExportStudent",
    "Final",
    "FitPredictor",
    "MeasureVariant",
    "Measurement",
    "Phase",
    "PrepareData",
    "Report",
    "RunConfig",
    "SampleArchs",
    "SearchFront",
    "SelectStudent",
    "Space",
    "Stem",
    "Threat",
    "TrainControl",
    "TrainPhase",
    "TrainTeacher",
    "TrainVariant",
    "TrainingAttack",
    "Unit",
    "UserError",
    "Validation",
    "VerifyFront",
    "job_settings",
    "json_schema",
    "load",
    "parse",
]
