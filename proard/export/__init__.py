"""Exports a student: three file formats, the comparison of each with the measured network, a model card."""

from proard.export.card import FROM_SUPERNET, TRAINED_ALONE, model_card
from proard.export.formats import StudentFacts, export_program, load_student, save_onnx, save_pt2, save_student
from proard.export.parity import check_parity, measured_logits
from proard.export.trust import Trust

__all__ = [
    "FROM_SUPERNET",
    "TRAINED_ALONE",
    "StudentFacts",
    "Trust",
    "check_parity",
    "export_program",
    "load_student",
    "measured_logits",
    "model_card",
    "save_onnx",
    "save_pt2",
    "save_student",
]
