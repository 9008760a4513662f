"""Plain FastAPI: one ``def`` handler, which FastAPI runs in its thread pool.

https://fastapi.tiangolo.com/tutorial/request-files/; run by ``uvicorn --workers``.
"""

from typing import Annotated

from fastapi import FastAPI, File, Response

from tests.benchmarks.peers.pipeline import Options, Pipeline

app = FastAPI()
pipeline = Pipeline(Options.from_environment())


@app.post("/segment")
def segment(image: Annotated[bytes, File()]) -> Response:
    """A photo in, its mask out."""
    return Response(pipeline(image), media_type="image/png")
