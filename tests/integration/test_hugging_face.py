"""Hugging Face's image segmentation, with its own client over a socket and with raw requests."""

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from service.artefact import voc
from tests.artefacts import encode, two_class_photo
from tests.clients import InProcess, Server, mask_of

PHOTO = encode(two_class_photo())
TASK = "/hf/image-segmentation"


@pytest.fixture(scope="module")
def segmenter(protocol_server: Server) -> InferenceClient:
    """Hugging Face's client, connected to the service."""
    # Without a token the client would send the developer's own.
    return InferenceClient(model=protocol_server.url + TASK, token="none")  # noqa: S106


@pytest.fixture(scope="module")
def mask(protocol_server: Server) -> npt.NDArray[np.uint8]:
    """The mask that `POST /segment` returns for the photo."""
    return mask_of(httpx.post(f"{protocol_server.url}/segment", content=PHOTO))


def assert_partition(segments: Any, mask: npt.NDArray[np.uint8]) -> None:  # noqa: ANN401
    """Assert one segment with the exact pixels of each class in the mask, largest first."""
    for segment in segments:
        assert segment.mask.mode == "L"
        expected = mask == voc.CLASSES.index(segment.label)
        np.testing.assert_array_equal(np.asarray(segment.mask), expected * np.uint8(255))
        assert 1 / 21 < segment.score <= 1
    pixels = [np.count_nonzero(segment.mask) for segment in segments]
    assert sum(pixels) == mask.size
    assert pixels == sorted(pixels, reverse=True)


def test_bytes(segmenter: InferenceClient, mask: npt.NDArray[np.uint8]) -> None:
    """The client sends bytes without a Content-Type."""
    segments = segmenter.image_segmentation(PHOTO)
    assert {"background", "cat", "person"} <= {segment.label for segment in segments}
    assert_partition(segments, mask)


def test_a_path(segmenter: InferenceClient, mask: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    """The client accepts a path."""
    path = tmp_path / "photo.png"
    path.write_bytes(PHOTO)
    assert_partition(segmenter.image_segmentation(path), mask)
    assert_partition(segmenter.image_segmentation(str(path)), mask)


def test_parameters(segmenter: InferenceClient, mask: npt.NDArray[np.uint8]) -> None:
    """With parameters the client sends base64; these values do not change the segments."""
    segments = segmenter.image_segmentation(
        PHOTO,
        subtask="semantic",
        threshold=0,
        mask_threshold=0,
        overlap_mask_area_threshold=0.5,
    )
    assert_partition(segments, mask)


def test_thresholds(segmenter: InferenceClient) -> None:
    """Thresholds remove segments with a low score and pixels with a low probability."""
    every = {segment.label: segment for segment in segmenter.image_segmentation(PHOTO)}
    scores = {name: segment.score or 0 for name, segment in every.items()}
    least = sorted(scores.values())[1]
    sure = segmenter.image_segmentation(PHOTO, threshold=least)
    assert {one.label for one in sure} == {name for name in scores if scores[name] >= least}
    for segment in segmenter.image_segmentation(PHOTO, mask_threshold=scores["person"]):
        kept = np.asarray(segment.mask) > 0
        assert not np.any(kept & (np.asarray(every[segment.label].mask) == 0))
        if segment.label == "person":
            assert 0 < kept.sum() < np.count_nonzero(every["person"].mask)


def test_another_model(protocol_server: Server, mask: npt.NDArray[np.uint8]) -> None:
    """The query parameter ``model`` selects the model."""
    url = f"{protocol_server.url}{TASK}?model="
    assert_partition(InferenceClient(model=f"{url}second").image_segmentation(PHOTO), mask)
    with pytest.raises(HfHubHTTPError, match="no model 'third'") as caught:
        InferenceClient(model=f"{url}third").image_segmentation(PHOTO)
    assert caught.value.response.status_code == 404


@pytest.mark.parametrize(
    ("image", "parameters", "status", "message"),
    [
        (b"hello", {}, 415, "not an image"),
        (PHOTO[:200], {}, 422, "broken, truncated"),
        (PHOTO, {"subtask": "panoptic"}, 422, "subtask"),
        (PHOTO, {"threshold": 2}, 422, "threshold"),
        (PHOTO, {"mask_threshold": -1}, 422, "mask_threshold"),
    ],
)
def test_errors_as_the_client_reads_them(
    segmenter: InferenceClient, image: bytes, parameters: dict[str, Any], status: int, message: str
) -> None:
    """The client's exception carries the service's message and status."""
    with pytest.raises(HfHubHTTPError, match=message) as caught:
        segmenter.image_segmentation(image, **parameters)
    assert caught.value.response.status_code == status


# ---- raw requests -----------------------------------------------------------------------------


def assert_error(response: httpx.Response, status: int) -> str:
    """Assert an error in Hugging Face's format; return its message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


@pytest.mark.anyio
async def test_base64_and_data_uris(client: InProcess) -> None:
    """Both forms of ``inputs`` work with any Content-Type; browsers produce data: URIs."""
    text = base64.b64encode(PHOTO).decode()
    plain = await client.http.post(TASK, content=PHOTO)
    for inputs in (text, f"data:image/png;base64,{text}"):
        for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/json"}):
            response = await client.http.post(
                TASK, content=b'\n{"inputs": "%s"}' % inputs.encode(), headers=headers
            )
            assert response.json() == plain.json()
    assert plain.headers["Content-Type"] == "application/json"
    assert plain.headers["X-Model"] == "tiny/1"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"{}", 400),
        (b'{"inputs": 1}', 400),
        (b'{"inputs": "?"}', 400),
        (b'{"inputs": "data:image/png"}', 400),
        (b'{"inputs": "data:,x"}', 415),
        (b'{"inputs": "", "parameters": {"top_k": 1}}', 422),
        (b'{"inputs": "", "parameters": {"threshold": "high"}}', 422),
        (b'{"inputs": "", "parameters": {"threshold": NaN}}', 422),
        (b'{"inputs": "", "parameters": {"threshold": 1e999}}', 422),
        (b'{"inputs": "", "parameters": {"threshold": ' + b"9" * 4000 + b"}}", 422),
        (b'{"inputs": "", "parameters": {"%s": 1}}' % (b"k" * 60_000), 422),
        (b'{"inputs": "", "parameters": {%s}}' % b",".join(b'"%d":1' % n for n in range(17)), 400),
        (b'{"inputs": "", "parameters": []}', 400),
        (b'{"inputs": "\\ud800"}', 400),
        (b'{"inputs": "aGVs bG8="}', 400),
        (b'{"inputs": "aGVsbG8"}', 400),
        (b'{"inputs": "\xf0\x9f\x98\x80"}', 400),
        (b'{"inputs": "data:,%68%65"}', 415),
        (b'{"inputs": "data:,' + b"%41" * 70_000 + b'"}', 413),
        (b'{"inputs": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400),
        (b'{"inputs": "?", "inputs": 1}', 400),
        (b" " * 100_000 + b"{}", 400),
        (bytes(100_001), 413),
        (b'{"inputs": "' + b"A" * 140_000 + b'"}', 413),
        (b'{"inputs": "' + b"A" * 240_000 + b'"}', 413),
    ],
)
async def test_errors(client: InProcess, body: bytes, status: int) -> None:
    """Invalid requests get a 4xx status in Hugging Face's format."""
    assert_error(await client.http.post(TASK, content=body), status)


@pytest.mark.anyio
async def test_draining(client: InProcess) -> None:
    """A draining service answers 503 with Retry-After."""
    client.service.begin_draining()
    refused = await client.http.post(TASK, content=PHOTO)
    assert_error(refused, 503)
    assert refused.headers["Retry-After"] == "1"
