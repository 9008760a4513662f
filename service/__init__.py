"""The serving half: photos in, per-pixel PASCAL VOC classes out, over HTTP or from the shell."""

import os

__version__ = "0.1.0"

# Before anything imports ONNX Runtime, whose wheels report to Microsoft unless told not to. Source:
# its Privacy.md.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
