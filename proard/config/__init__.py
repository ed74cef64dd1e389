"""Settings of a run: one frozen class per stage, strict parsing, and the JSON schema generated from them."""

from proard.config.attacks import Attack, Curriculum, Threat, TrainingAttack
from proard.config.diagnosis import TEACHER, Clever, Diagnose, Diagnosed, Smoothing
from proard.config.fields import ConfigError, UserError
from proard.config.presets import PRESETS
from proard.config.run import NEEDS, RunConfig, job_settings, json_schema, load, parse
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

__all__ = [
    "NEEDS",
    "PRESETS",
    "TEACHER",
    "Attack",
    "Augmentation",
    "Clever",
    "ConfigError",
    "Curriculum",
    "Diagnose",
    "Diagnosed",
    "EvaluateArchs",
    "ExportStudent",
    "Final",
    "FitPredictor",
    "Measurement",
    "Phase",
    "PrepareData",
    "Report",
    "RunConfig",
    "SampleArchs",
    "SearchFront",
    "SelectStudent",
    "Smoothing",
    "Space",
    "Stem",
    "Threat",
    "TrainControl",
    "TrainPhase",
    "TrainTeacher",
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
