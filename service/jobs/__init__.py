"""What image workers do with photos: the two halves of a job on either side of the network.

Nothing here imports FastAPI or ONNX Runtime. The template of the workers imports this package, so
that every job is in memory when a worker is forked.
"""

from service.jobs import base, hugging_face, label_studio, open_inference, view

__all__ = ["base", "hugging_face", "label_studio", "open_inference", "view"]
