"""Small reference implementations of looped language models, in plain PyTorch.

Examples, tests and the demo import from here. Passes and backends never do: a pass that names an architecture is a bug.
"""

from loopq_compile.models.ouro import LoopedLMOutput, Ouro, OuroConfig, exit_distribution

__all__ = ["LoopedLMOutput", "Ouro", "OuroConfig", "exit_distribution"]
