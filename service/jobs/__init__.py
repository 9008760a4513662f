"""What image workers do with photos: the two halves of a job on either side of the network.

Nothing here imports FastAPI or ONNX Runtime. The template of the workers imports this package, so
that every job is in memory when a worker is forked.
"""

from service.images.decoding import keep_readers_quiet
from service.jobs import base, hugging_face, label_studio, open_inference, view

__all__ = ["base", "hugging_face", "label_studio", "open_inference", "prepare_process", "view"]


def prepare_process() -> None:
    """Prepare the template's process; its workers inherit that."""
    keep_readers_quiet()
