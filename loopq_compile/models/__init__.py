"""Small reference implementations of looped language models, in plain PyTorch.

Examples, tests and the demo import from here. Passes and backends never do: a pass that names an architecture is a bug.
"""

from loopq_compile.models.huginn import Huginn, HuginnConfig
from loopq_compile.models.loopformer import LoopFormer, LoopFormerConfig
from loopq_compile.models.nanbeige import Nanbeige, NanbeigeConfig
from loopq_compile.models.ouro import LoopedLMOutput, Ouro, OuroConfig, exit_distribution
from loopq_compile.models.parcae import Parcae, ParcaeConfig
from loopq_compile.models.parts import read_config
from loopq_compile.models.repeated import Repeat, repeat_layers

__all__ = [
    "Huginn",
    "HuginnConfig",
    "LoopFormer",
    "LoopFormerConfig",
    "LoopedLMOutput",
    "Nanbeige",
    "NanbeigeConfig",
    "Ouro",
    "OuroConfig",
    "Parcae",
    "ParcaeConfig",
    "Repeat",
    "exit_distribution",
    "read_config",
    "repeat_layers",
]
