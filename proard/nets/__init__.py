"""Elastic layers, the supernet, its views, extraction, folding and batch-norm recalibration."""

from proard.nets.calibration import recalibrate
from proard.nets.elastic import ElasticConvNorm, ElasticLinear, Supernet
from proard.nets.files import (
    bare_network,
    load_deepmind,
    load_static,
    load_supernet,
    load_trades,
    save_static,
    save_supernet,
)
from proard.nets.fixed import FixedNet, FixedView
from proard.nets.forward import run_network
from proard.nets.sorting import sort_channels
from proard.nets.subnet import FoldedNet, StaticNet, extract, fold, implant
from proard.nets.view import SubnetView

__all__ = [
    "ElasticConvNorm",
    "ElasticLinear",
    "FixedNet",
    "FixedView",
    "FoldedNet",
    "StaticNet",
    "SubnetView",
    "Supernet",
    "bare_network",
    "extract",
    "fold",
    "implant",
    "load_deepmind",
    "load_static",
    "load_supernet",
    "load_trades",
    "recalibrate",
    "run_network",
    "save_static",
    "save_supernet",
    "sort_channels",
]
