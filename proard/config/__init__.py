"""Settings of a run: one frozen class per stage, strict parsing, and the JSON schema generated from them."""

from proard.config.attacks import OBJECTIVE_WORDS, Attack, Threat, TrainingAttack
from proard.config.budgets import searched_costs
from proard.config.diagnosis import TEACHER, Clever, Diagnose, Diagnosed, Smoothing
from proard.config.experiment import COMPARED, Experiment, MeasureExperiment, SupernetTraining, Twins, group_of
from proard.config.fields import ConfigError, DataError, UserError
from proard.config.files import read_file
from proard.config.images import PrepareData
from proard.config.nets import (
    NETS,
    DeepMindPreActResNet,
    DeepMindWideResNet,
    VisionTransformer,
    WideResNet,
    named_nets,
)
from proard.config.presets import PRESETS
from proard.config.quantisation import Int8Training, QuantizeStudent
from proard.config.run import (
    NEEDS,
    RunConfig,
    job_settings,
    json_schema,
    load,
    parse,
)
from proard.config.search import SearchFront
from proard.config.settings import (
    Augmentation,
    EvaluateArchs,
    ExportStudent,
    FitPredictor,
    Measurement,
    Phase,
    Report,
    SampleArchs,
    SelectStudent,
    TrainControl,
    TrainPhase,
    TrainTeacher,
    Validation,
    VerifyFront,
)
from proard.config.spaces import Final, Space, Stem, Unit
from proard.config.students import Effort, Student, TrainingSettings
from proard.config.trust import LEAST_CLASSES, AutoattackStudent, CheckStudent

__all__ = [
    "COMPARED",
    "LEAST_CLASSES",
    "NEEDS",
    "NETS",
    "OBJECTIVE_WORDS",
    "PRESETS",
    "TEACHER",
    "Attack",
    "Augmentation",
    "AutoattackStudent",
    "CheckStudent",
    "Clever",
    "ConfigError",
    "DataError",
    "DeepMindPreActResNet",
    "DeepMindWideResNet",
    "Diagnose",
    "Diagnosed",
    "Effort",
    "EvaluateArchs",
    "Experiment",
    "ExportStudent",
    "Final",
    "FitPredictor",
    "Int8Training",
    "MeasureExperiment",
    "Measurement",
    "Phase",
    "PrepareData",
    "QuantizeStudent",
    "Report",
    "RunConfig",
    "SampleArchs",
    "SearchFront",
    "SelectStudent",
    "Smoothing",
    "Space",
    "Stem",
    "Student",
    "SupernetTraining",
    "Threat",
    "TrainControl",
    "TrainPhase",
    "TrainTeacher",
    "TrainingAttack",
    "TrainingSettings",
    "Twins",
    "Unit",
    "UserError",
    "Validation",
    "VerifyFront",
    "VisionTransformer",
    "WideResNet",
    "group_of",
    "job_settings",
    "json_schema",
    "load",
    "named_nets",
    "parse",
    "read_file",
    "searched_costs",
]
