"""Configuration of a run: the dataclasses, and their conversion to and from plain JSON types."""

from msdetr.config.parsing import config_from_dict, config_to_dict
from msdetr.config.schema import (
    AssignmentConfig,
    CompileConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AssignmentConfig",
    "CompileConfig",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
]
