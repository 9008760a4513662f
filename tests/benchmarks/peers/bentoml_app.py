"""BentoML: a service with adaptive batching behind a wrapper that takes single photos.

https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html: a batchable API takes and
returns lists, so a single photo goes through a wrapper service. Without batching the API takes the
photo directly. ``bentoml serve`` starts the workers of both services.
"""

from pathlib import Path
from typing import Annotated

import bentoml
import PIL.Image

from tests.benchmarks.peers.pipeline import Options, Pipeline, decode, prepare, to_png

options = Options.from_environment()
TRAFFIC = {"timeout": 120}


@bentoml.service(workers=options.workers, threads=1, traffic=TRAFFIC)
class Segment:
    """A photo in, its mask out, without batching."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(options)

    @bentoml.api
    def segment(
        self, image: PIL.Image.Image
    ) -> Annotated[bytes, bentoml.validators.ContentType("image/png")]:
        """One photo."""
        (mask,) = self.pipeline.predict([prepare(image)])
        return to_png(mask)


@bentoml.service(workers=options.workers, threads=1, traffic=TRAFFIC)
class Batched:
    """Encoded photos in, encoded masks out."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(options)

    @bentoml.api(batchable=True, max_batch_size=max(2, options.batch), max_latency_ms=120_000)
    def segment(self, images: list[bytes]) -> list[bytes]:
        """One batch."""
        masks = self.pipeline.predict([decode(image) for image in images])
        return [to_png(mask) for mask in masks]


@bentoml.service(traffic=TRAFFIC)
class SegmentBatched:
    """The wrapper that takes single photos."""

    batched = bentoml.depends(Batched)

    @bentoml.api
    async def segment(
        self, image: Path
    ) -> Annotated[bytes, bentoml.validators.ContentType("image/png")]:
        """One photo."""
        (png,) = await self.batched.to_async.segment([image.read_bytes()])  # noqa: ASYNC240
        answer: bytes = png
        return answer
