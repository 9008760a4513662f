"""The network files of an artefact. Only the float network's file contains weights.

The other precisions' files, in the same folder, read them as ONNX external data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx
from onnx import GraphProto, ModelProto, OperatorSetIdProto, TensorProto, helper

from models.errors import StageError
from service.artefact.contract import ModelContract, Precision
from service.artefact.files import write_atomically

NETWORK_FILES: Final[dict[Precision, str]] = {
    "fp32": "network.onnx",
    "fp16": "network.fp16.onnx",
    "int8": "network.int8.onnx",
}
"""File names in an artefact folder; fp32 always exists."""


class GraphError(StageError):
    """The network cannot be written in another precision; the message names the cause."""


class FloatNetwork:
    """An exported network, the source of the files that compute in another precision."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._bytes = path.read_bytes()
        self._model = onnx.load_model_from_string(self._bytes)
        self.graph = self._model.graph
        self.contract = ModelContract.from_metadata(
            {p.key: p.value for p in self._model.metadata_props}
        )

    def refer(self, tensor: TensorProto) -> TensorProto:
        """Return a reference to one of its tensors. Source: ONNX, ``docs/ExternalData.md``.

        Raises:
            GraphError: the file does not contain the tensor's bytes unchanged.
        """
        offset = self._bytes.find(tensor.raw_data)
        if not tensor.raw_data or offset < 0:
            raise GraphError(f"{tensor.name}: not stored as raw data in {self._name}")
        external = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        external.data_location = TensorProto.EXTERNAL
        entries = {"location": self._name, "offset": offset, "length": len(tensor.raw_data)}
        for key, value in entries.items():
            external.external_data.add(key=key, value=str(value))
        return external

    def derive(
        self, graph: GraphProto, precision: Precision, opsets: Sequence[OperatorSetIdProto]
    ) -> ModelProto:
        """Return ``graph`` as this network in another precision, with its contract."""
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self._model.ir_version)
        model.producer_name = self._model.producer_name
        contract = self.contract.model_copy(update={"precision": precision})
        helper.set_model_props(model, contract.to_metadata())
        return model


def save_network(model: ModelProto, artefact: Path, precision: Precision) -> None:
    """Write a network file into an artefact folder atomically, and print its size."""
    path = artefact / NETWORK_FILES[precision]
    with write_atomically(path) as file:
        onnx.save(model, file)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
