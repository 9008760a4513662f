"""Segments photos: the class of each pixel, over HTTP or from the command line."""

import os

__version__ = "0.2.0"

# ONNX Runtime's wheels send telemetry to Microsoft unless this is set before the import. Source:
# its Privacy.md.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
