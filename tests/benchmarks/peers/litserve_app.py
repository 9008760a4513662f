"""LitServe: a `LitAPI` with ``max_batch_size`` and ``batch_timeout``, several workers per device.

https://lightning.ai/docs/litserve/features/batching. The photos of a batch have different shapes,
so `batch` and `unbatch` keep the list. The server decodes and encodes in its workers.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
import numpy.typing as npt
from fastapi import File, Response

from tests.benchmarks.peers.pipeline import Options, Pipeline, Prepared, decode, to_png


class Segment(litserve.LitAPI):
    """A photo in, its mask out."""

    def setup(self, device: str) -> None:
        """Load the network in a worker."""
        self.pipeline = Pipeline(Options.from_environment())

    def decode_request(self, request: Annotated[bytes, File()]) -> Prepared:
        """JPEG to input."""
        return decode(request)

    def batch(self, inputs: list[Prepared]) -> list[Prepared]:
        """Keep the list."""
        return inputs

    def predict(self, x: Any) -> Any:  # noqa: ANN401 - one input or a list of them
        """Masks of a batch; without batching LitServe passes one input."""
        return self.pipeline.predict(x) if isinstance(x, list) else self.pipeline.predict([x])[0]

    def unbatch(self, output: list[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.uint8]]:
        """Keep the list."""
        return output

    def encode_response(self, output: npt.NDArray[np.uint8]) -> Response:
        """Mask to PNG."""
        return Response(to_png(output), media_type="image/png")


if __name__ == "__main__":
    options = Options.from_environment()
    api = Segment(
        max_batch_size=options.batch,
        batch_timeout=options.wait_ms / 1000 if options.batch > 1 else 0.0,
        api_path="/segment",
    )
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=options.workers, timeout=120
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False
    )
