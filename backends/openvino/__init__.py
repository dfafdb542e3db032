"""The OpenVINO backend: a folder that OpenVINO, optimum-intel and openvino-genai read, with keys and values inside.

Steps of an export, one module each: the ONNX backend translates the program and leaves weights, linears and attention
opaque; `conversions` turns those into OpenVINO's own forms; `state` moves caches into the model; `exporter` writes.
"""

from loopq_compile.backends.openvino.executable import OpenVinoExecutable
from loopq_compile.backends.openvino.exporter import OpenVinoExport, export

__all__ = ["OpenVinoExecutable", "OpenVinoExport", "export"]
