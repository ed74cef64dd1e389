"""Settings of a run: one frozen class per stage, strict parsing, and the JSON schema generated from them."""

from proard.config.attacks import Attack, Curriculum, Threat, TrainingAttack
from proard.config.fields import ConfigError, UserError
from proard.config.nets import NETS, VisionTransformer, WideResNet, named_nets
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
from proard.config.students import CompareStudents, EvaluateStudent, Student, TrainStudent
from proard.config.twins import CompareTwins, MeasureTwin

__all__ = [
    "NEEDS",
    "NETS",
    "PRESETS",
    "Attack",
    "Augmentation",
    "CompareStudents",
    "CompareTwins",
    "ConfigError",
    "Curriculum",
    "EvaluateArchs",
    "EvaluateStudent",
    "ExportStudent",
    "Final",
    "FitPredictor",
    "MeasureTwin",
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
    "Student",
    "Threat",
    "TrainControl",
    "TrainPhase",
    "TrainStudent",
    "TrainTeacher",
    "TrainingAttack",
    "Unit",
    "UserError",
    "Validation",
    "VerifyFront",
    "VisionTransformer",
    "WideResNet",
    "job_settings",
    "json_schema",
    "load",
    "named_nets",
    "parse",
]
