"""Settings of a run: one frozen class per stage, strict parsing, and the JSON schema generated from them."""

from proard.config.attacks import OBJECTIVE_WORDS, Attack, Curriculum, Threat, TrainingAttack
from proard.config.diagnosis import TEACHER, Clever, Diagnose, Diagnosed, Smoothing
from proard.config.fields import ConfigError, DataError, UserError
from proard.config.files import read_file
from proard.config.images import PrepareData
from proard.config.nets import NETS, VisionTransformer, WideResNet, named_nets
from proard.config.presets import PRESETS
from proard.config.run import (
    EXPERIMENTS,
    NEEDS,
    RunConfig,
    at_any_rhythm,
    job_settings,
    json_schema,
    load,
    parse,
    without_rhythm,
)
from proard.config.settings import (
    Augmentation,
    EvaluateArchs,
    ExportStudent,
    FitPredictor,
    Measurement,
    Phase,
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
from proard.config.variants import CompareVariants, MeasureVariant, TrainVariant

__all__ = [
    "EXPERIMENTS",
    "NEEDS",
    "NETS",
    "OBJECTIVE_WORDS",
    "PRESETS",
    "TEACHER",
    "Attack",
    "Augmentation",
    "Clever",
    "CompareStudents",
    "CompareTwins",
    "CompareVariants",
    "ConfigError",
    "Curriculum",
    "DataError",
    "Diagnose",
    "Diagnosed",
    "EvaluateArchs",
    "EvaluateStudent",
    "ExportStudent",
    "Final",
    "FitPredictor",
    "MeasureTwin",
    "MeasureVariant",
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
    "Student",
    "Threat",
    "TrainControl",
    "TrainPhase",
    "TrainStudent",
    "TrainTeacher",
    "TrainVariant",
    "TrainingAttack",
    "Unit",
    "UserError",
    "Validation",
    "VerifyFront",
    "VisionTransformer",
    "WideResNet",
    "at_any_rhythm",
    "job_settings",
    "json_schema",
    "load",
    "named_nets",
    "parse",
    "read_file",
    "without_rhythm",
]
