"""The options of every stage: defaults, ranges and meanings. (`corda --help` reads this package: no heavy imports.)"""

from .compare import CompareConfig, MethodConfig
from .data import ContextConfig, DataConfig, NamedConfig
from .eval import EvalConfig, JudgeConfig
from .init import CordaConfig
from .inspect import InspectConfig
from .lora import LoraStart
from .model import ModelConfig
from .train import KeepConfig, TrainConfig
from .values import CordaError

__all__ = [
    "CompareConfig",
    "ContextConfig",
    "CordaConfig",
    "CordaError",
    "DataConfig",
    "EvalConfig",
    "InspectConfig",
    "JudgeConfig",
    "KeepConfig",
    "LoraStart",
    "MethodConfig",
    "ModelConfig",
    "NamedConfig",
    "TrainConfig",
]
