"""``fcn-segment serve`` with stored logits in place of the network.

    python -m tests.benchmarks.pipe_service DATA.npz serve --port 8000 ...

Everything else is the real service.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from service.__main__ import main
from service.app import create_app
from service.artefact.contract import ModelContract, TensorInfo
from service.server import serving


@dataclass(frozen=True)
class Tensor:
    """ONNX Runtime's ``NodeArg``. `tests.fakes` imports packages that `.venv-serve` lacks."""

    name: str
    type: str
    shape: Sequence[int | str | None]


@dataclass(frozen=True)
class Metadata:
    """ONNX Runtime's ``ModelMetadata``."""

    custom_metadata_map: Mapping[str, str]


class StoredLogits:
    """A stand-in for ONNX Runtime's session that returns stored logits.

    ``data``: a ``.npz`` with ``logits``, ``(1, 21, h, w) float32`` for one padded shape, and the
    network's metadata as ``contract``. Other shapes get zeros.
    """

    def __init__(self, data: Path) -> None:
        with np.load(data) as stored:
            self._logits = stored["logits"]
            self._metadata = ModelContract.model_validate_json(str(stored["contract"]))

    def get_inputs(self) -> Sequence[TensorInfo]:
        """The contract's input."""
        return [Tensor("image", "tensor(uint8)", ["N", "h", "w", 3])]

    def get_outputs(self) -> Sequence[TensorInfo]:
        """The contract's output."""
        return [Tensor("logits", "tensor(float)", ["N", 21, "lh", "lw"])]

    def get_modelmeta(self) -> Metadata:
        """The contract's metadata."""
        return Metadata(self._metadata.to_metadata())

    def get_providers(self) -> Sequence[str]:
        """The CPU provider."""
        return ["CPUExecutionProvider"]

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,  # noqa: ANN401
    ) -> Sequence[Any]:
        """The stored logits, repeated for each photo of the batch."""
        batch, height, width, _ = input_feed["image"].shape
        stride = self._metadata.stride
        shape = (21, height // stride, width // stride)
        if self._logits.shape[1:] != shape:
            return [np.zeros((batch, *shape), dtype=np.float32)]
        return [np.broadcast_to(self._logits, (batch, *shape))]

    def io_binding(self) -> Any:  # noqa: ANN401
        """Not implemented: only the GPU path uses it."""
        raise NotImplementedError

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:  # noqa: ANN401
        """Not implemented: only the GPU path uses it."""
        raise NotImplementedError


if __name__ == "__main__":
    session = StoredLogits(Path(sys.argv[1]))
    serving.create_app = partial(create_app, session=session)  # type: ignore[attr-defined]
    del sys.argv[1]  # the service parses the rest
    # Start through the service's own main, because its allocator settings affect a request's cost.
    sys.exit(main())
