"""Small reference implementations of looped language models, in plain PyTorch.

Examples, tests and the demo import from here. Passes and backends never do: a pass that names an architecture is a bug.
"""

from loopq_compile.models.ouro import LoopedLMOutput, Ouro, OuroConfig, exit_distribution
from loopq_compile.models.repeated import Repeat, repeat_layers

__all__ = ["LoopedLMOutput", "Ouro", "OuroConfig", "Repeat", "exit_distribution", "repeat_layers"]
