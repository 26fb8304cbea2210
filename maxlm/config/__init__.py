"""Configuration: schema, YAML, overrides, validation that reports all mistakes at once. Does not import JAX."""

from maxlm.config.data import DataConfig, TokenizerConfig
from maxlm.config.load import dump_yaml, json_schema, load_config, parse_config
from maxlm.config.model import ModelConfig
from maxlm.config.sweep import SweepConfig
from maxlm.config.train import TrainConfig

__all__ = [
    "DataConfig",
    "ModelConfig",
    "SweepConfig",
    "TokenizerConfig",
    "TrainConfig",
    "dump_yaml",
    "json_schema",
    "load_config",
    "parse_config",
]
