"""A stand-in for ONNX Runtime's session that a test can pause."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.artefact.contract import ModelContract, TensorInfo
from tests.artefacts import make_contract


@dataclass
class FakeTensor:
    """A stand-in for ONNX Runtime's ``NodeArg``."""

    name: str
    type: str
    shape: Sequence[int | str | None]


@dataclass
class FakeMetadata:
    """A stand-in for ONNX Runtime's ``ModelMetadata``."""

    custom_metadata_map: Mapping[str, str]


@dataclass
class FakeSession:
    """A session that labels everything background.

    Each run sets ``started`` and waits for ``gate``, which is open until a test closes it. With
    ``error`` set, a run raises it.
    """

    contract: ModelContract = field(default_factory=make_contract)
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    threads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    def get_inputs(self) -> Sequence[TensorInfo]:
        """The contract's input."""
        return [FakeTensor("image", "tensor(uint8)", ["N", "h", "w", 3])]

    def get_outputs(self) -> Sequence[TensorInfo]:
        """The contract's output."""
        return [FakeTensor("logits", "tensor(float)", ["N", 21, "lh", "lw"])]

    def get_modelmeta(self) -> FakeMetadata:
        """The contract's metadata."""
        return FakeMetadata(self.contract.to_metadata())

    def get_providers(self) -> Sequence[str]:
        """The CPU provider."""
        return ["CPUExecutionProvider"]

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,  # noqa: ANN401
    ) -> Sequence[Any]:
        """Zero logits, once the gate is open."""
        self.threads.append(threading.current_thread().name)
        self.started.set()
        assert self.gate.wait(timeout=30)
        if self.error is not None:
            raise self.error
        batch, height, width, _ = input_feed["image"].shape
        stride = self.contract.stride
        return [np.zeros((batch, 21, height // stride, width // stride), dtype=np.float32)]

    def io_binding(self) -> Any:  # noqa: ANN401
        """Not implemented: only the GPU path uses it."""
        raise NotImplementedError

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:  # noqa: ANN401
        """Not implemented: only the GPU path uses it."""
        raise NotImplementedError
