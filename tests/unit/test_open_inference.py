"""Tensors of the Open Inference Protocol, read and written as image workers do."""

import base64
import json
import pickle
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from service.errors import ImageTooLarge, MalformedRequest
from service.inference.upsampling import Labels
from service.jobs.base import Grant, NeedsMemory
from service.jobs.messages import json_memory
from service.jobs.open_inference import InferenceJob
from service.views import Scene
from tests.artefacts import encode, make_contract

JOB = InferenceJob("tiny", None, max_bytes=2**20, max_side=2048)
GRANT = Grant(max_pixels=64_000_000, memory_bytes=2**30)
CONTRACT = make_contract()


def request(data: object, shape: tuple[int, ...], **members: object) -> bytes:
    """A request with a UINT8 tensor in JSON."""
    tensor = {"name": "image", "shape": shape, "datatype": "UINT8", "data": data}
    return json.dumps({"inputs": [tensor], **members}).encode()


@pytest.mark.parametrize("nested", ["flat", "rows", "nested", "leading"])
def test_numbers_become_pixels(nested: str) -> None:
    """Flat or nested to any depth, they are the photo's pixels row by row."""
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    data: Any = {
        "flat": pixels.reshape(-1),
        "rows": pixels.reshape(4, -1),
        "nested": pixels,
        "leading": pixels[None],
    }[nested]
    shape = (1, 4, 5, 3) if nested == "leading" else (4, 5, 3)
    reading = JOB.read(request(data.tolist(), shape), GRANT, CONTRACT)
    np.testing.assert_array_equal(reading.photo.pixels, pixels)


@pytest.mark.parametrize(
    "data",
    [
        ["a" * 100_000, *["1"] * 2_000],
        [["a" * 100_000], *[["1"]] * 2_000],
        [1, "a" * 100_000, *[1] * 2_000],
        [10**4000, *[1] * 2_000],
        [[[]], [[[]]], *[[1]] * 2_000],
        [{"a": 1}] * 2_000,
        [1.5] * 2_000,
        [float("nan")] * 2_000,
        [None] * 2_000,
        [True] * 2_000,
        [256] * 2_000,
        [-1] * 2_000,
        [[1, 2], [3]] * 1_000,
    ],
)
def test_other_values_than_numbers(data: list[Any]) -> None:
    """They are refused before NumPy makes an array of them, which could take gigabytes."""
    body = request(data, (20, 33, 3))
    tracemalloc.start()
    try:
        with pytest.raises(MalformedRequest, match="image: "):
            JOB.read(body, GRANT, CONTRACT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(body) + 2**20


def test_memory_is_asked_for_before_json_is_read() -> None:
    """Too small a grant says what it must be, though the JSON is malformed."""
    body = b'{"inputs": [' + b"[]," * 100_000
    with pytest.raises(NeedsMemory) as needs:
        JOB.read(body, GRANT._replace(memory_bytes=1), CONTRACT)
    assert needs.value.memory_bytes == json_memory(body)
    assert needs.value.pixels == 0  # it is no photo: its time is not estimated from pixels


@pytest.mark.parametrize(
    ("outputs", "most"),
    [(["mask"], 33_554_432), (["mask", "confidence"], 16_777_216)],
)
def test_the_longest_answer_in_json(outputs: list[str], most: int) -> None:
    """The pixels of a photo whose answer has 128 MiB are accepted; one row more is refused."""
    job = replace(JOB, max_bytes=200_000_000)
    for height, fits in ((most // 2048, True), (most // 2048 + 1, False)):
        pixels = np.zeros((height, 2048, 3), np.uint8)
        for binary in (False, True):
            tensor = {
                "name": "image",
                "shape": pixels.shape,
                "datatype": "UINT8",
                "parameters": {"binary_data_size": pixels.size},
            }
            names = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
            head = json.dumps({"inputs": [tensor], "outputs": names}).encode()
            sized = replace(job, json_bytes=len(head))
            if fits or binary:
                sized.read(head + pixels.data, GRANT, CONTRACT)
            else:
                with pytest.raises(ImageTooLarge, match="ask for binary data"):
                    sized.read(head + pixels.data, GRANT, CONTRACT)


def test_the_advice_comes_before_the_memory() -> None:
    """A photo whose answer is too long for JSON is refused before memory for it is asked for."""
    photo = encode(np.zeros((3000, 6000, 3), np.uint8), "JPEG")
    text = base64.b64encode(photo).decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
    body = json.dumps({"inputs": [tensor]}).encode()
    little = GRANT._replace(memory_bytes=24 * 2**20)
    with pytest.raises(ImageTooLarge, match="ask for binary data"):
        JOB.read(body, little, CONTRACT)
    binary = body[:-1] + b', "parameters": {"binary_data_output": true}}'
    with pytest.raises(NeedsMemory):
        JOB.read(binary, little, CONTRACT)


@pytest.mark.parametrize("binary", [(False, False), (True, True), (True, False), (False, True)])
def test_the_answer(binary: tuple[bool, bool]) -> None:
    """JSON and binary data have the pixels of each output; ids are echoed as they are."""
    names = ("mask", "confidence")
    outputs = [
        {"name": name, "parameters": {"binary_data": one}}
        for name, one in zip(names, binary, strict=True)
    ]
    identity = 'é"\\\u2028\U0001f600\0'
    body = request([0] * 18, (1, 2, 3, 3), outputs=outputs, id=identity)
    pickled = pickle.dumps(JOB.read(body, GRANT, CONTRACT).writer)
    writer = pickle.loads(pickled)  # noqa: S301
    arrays: dict[str, npt.NDArray[np.uint8]] = {
        name: np.random.default_rng(seed).integers(0, 256, (2, 3), dtype=np.uint8)
        for seed, name in enumerate(names)
    }
    scene = Scene(Labels(arrays["mask"], arrays["confidence"]), CONTRACT)
    written = writer.write(scene)
    length = written.facts["json_bytes"]
    content = bytes(written.content)
    answer, tail = json.loads(content[:length]), content[length:] if length else b""
    assert (length is None) == (not any(binary))
    assert answer["id"] == identity
    for output, one in zip(answer["outputs"], binary, strict=True):
        assert output["shape"] == [1, 2, 3]
        values = output.get("data")
        if one:
            size = output["parameters"]["binary_data_size"]
            values, tail = list(tail[:size]), tail[size:]
        assert values == arrays[output["name"]].reshape(-1).tolist()
    assert tail == b""
