"""The configuration: one YAML file per setting, validated before anything runs.

Every section refuses unknown keys and wrong types. `Config.identity` is the part that decides the numbers of a run: two
runs with the same identity and the same seed hold the same counts.
"""

from core.config.compute import ComputeConfig
from core.config.dataset import DatasetConfig, SplitConfig
from core.config.loading import load_config, parse_config, parse_values
from core.config.models import BaseModelsConfig, ClassifierConfig, DenoiserConfig
from core.config.run import Config
from core.config.steps import CertifyConfig, EstimatorConfig, FinetuneConfig, LabelConfig, ReportConfig
from core.config.sweep import Setting, Sweep, load_sweep
from core.config.training import DenoiserTrainConfig, TrainConfig

__all__ = [
    "BaseModelsConfig",
    "CertifyConfig",
    "ClassifierConfig",
    "ComputeConfig",
    "Config",
    "DatasetConfig",
    "DenoiserConfig",
    "DenoiserTrainConfig",
    "EstimatorConfig",
    "FinetuneConfig",
    "LabelConfig",
    "ReportConfig",
    "Setting",
    "SplitConfig",
    "Sweep",
    "TrainConfig",
    "load_config",
    "load_sweep",
    "parse_config",
    "parse_values",
]
