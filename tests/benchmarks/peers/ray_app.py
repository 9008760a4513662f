"""Ray Serve: replicas of a deployment, each with ``@serve.batch``.

https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html; photos arrive through a
FastAPI ingress, as in Serve's HTTP guide.
"""

import asyncio
import sys
import tempfile
from typing import Annotated

import ray
from fastapi import FastAPI, File, Response
from ray import serve

from tests.benchmarks.peers.pipeline import Options, Pipeline, decode, to_png

options = Options.from_environment()
app = FastAPI()


@serve.deployment(
    num_replicas=options.workers,
    max_ongoing_requests=32,
    ray_actor_options={"num_cpus": 2 / options.workers},
)
@serve.ingress(app)
class Segment:
    """A photo in, its mask out."""

    def __init__(self, given: Options) -> None:
        self.pipeline = Pipeline(given)
        self.batch.set_max_batch_size(given.batch)
        self.batch.set_batch_wait_timeout_s(given.wait_ms / 1000 if given.batch > 1 else 0.0)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def batch(self, images: list[bytes]) -> list[bytes]:
        """One batch, in a thread beside the replica's event loop."""
        return await asyncio.to_thread(self._run, images)

    def _run(self, images: list[bytes]) -> list[bytes]:
        masks = self.pipeline.predict([decode(image) for image in images])
        return [to_png(mask) for mask in masks]

    @app.post("/segment")
    async def segment(self, image: Annotated[bytes, File()]) -> Response:
        """One photo."""
        return Response(await self.batch(image), media_type="image/png")


if __name__ == "__main__":
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        _temp_dir=tempfile.gettempdir(),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Segment.bind(options), blocking=True)  # type: ignore[attr-defined]
