"""From an `nn.Module` to a graph, through `torch.export`."""

from loopq_compile.capture.to_graph import capture

__all__ = ["capture"]
