"""The serving half: labels every pixel of a photo, over HTTP or from the shell."""

import os

__version__ = "0.2.0"

# Set before anything imports ONNX Runtime, whose wheels otherwise report to Microsoft. Source: its
# Privacy.md.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
