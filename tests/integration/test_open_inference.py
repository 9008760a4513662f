"""The Open Inference Protocol, with Triton's own client over a socket and with raw requests."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import structlog.testing
import tritonclient.http as triton  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from service import __version__
from service.artefact import voc
from service.segmenter import Segmenter
from service.settings import Settings
from tests.artefacts import encode, two_class_photo
from tests.clients import InProcess, Server, in_process, mask_of
from tests.fakes import FakeSession

PHOTO = two_class_photo()
HEIGHT, WIDTH, _ = PHOTO.shape
PNG = encode(PHOTO)
INFER = "/v2/models/tiny/infer"
LENGTH = "Inference-Header-Content-Length"
OCTETS = "application/octet-stream"

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def client(protocol_server: Server) -> Iterator[Any]:
    """Triton's client, connected to the service."""
    with triton.InferenceServerClient(protocol_server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def mask(protocol_server: Server) -> Pixels:
    """The mask that `POST /segment` returns for the photo."""
    return mask_of(httpx.post(f"{protocol_server.url}/segment", content=PNG))


def raw(pixels: Pixels = PHOTO, *, binary: bool = True) -> Any:  # noqa: ANN401
    """An input of pixels."""
    tensor = triton.InferInput("image", pixels.shape, "UINT8")
    return tensor.set_data_from_numpy(pixels, binary_data=binary)


def encoded(data: bytes = PNG, shape: tuple[int, ...] = (1,)) -> Any:  # noqa: ANN401
    """An input with an image file."""
    tensor = triton.InferInput("image", shape, "BYTES")
    return tensor.set_data_from_numpy(np.array([data], dtype=np.object_).reshape(shape))


def wanted(name: str = "mask", *, binary: bool = True) -> Any:  # noqa: ANN401
    """One output."""
    return triton.InferRequestedOutput(name, binary_data=binary)


# ---- Triton's client ---------------------------------------------------------------------------


def test_health(client: Any) -> None:  # noqa: ANN401
    """The server is alive; it and each model are ready, loaded or not."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("second", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("third")


def test_metadata(client: Any) -> None:  # noqa: ANN401
    """The server and a model, with or without its version, return their metadata."""
    assert client.get_server_metadata() == {
        "name": "fcn-segment",
        "version": __version__,
        "extensions": ["binary_tensor_data"],
    }
    metadata = client.get_model_metadata("tiny")
    assert metadata == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, 3]}],
        "outputs": [
            {"name": "mask", "datatype": "UINT8", "shape": [-1, -1]},
            {"name": "confidence", "datatype": "UINT8", "shape": [-1, -1]},
        ],
        "parameters": {"classes": ",".join(voc.CLASSES)},
    }
    assert client.get_model_metadata("tiny", "1") == metadata


def test_repository_index(client: Any) -> None:  # noqa: ANN401
    """The index lists all models, the default first."""
    ready = {"version": "1", "state": "READY", "reason": ""}
    assert client.get_model_repository_index() == [
        {"name": "tiny", **ready},
        {"name": "second", **ready},
    ]


def test_there_is_no_model_configuration(client: Any) -> None:  # noqa: ANN401
    """Without this extension of Triton's the client gets an error that it understands."""
    with pytest.raises(InferenceServerException, match="Not Found") as caught:
        client.get_model_config("tiny")
    assert caught.value.status() == "404"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("leading", [True, False])
def test_pixels_in_mask_out(
    client: Any,  # noqa: ANN401
    mask: Pixels,
    binary_in: bool,
    binary_out: bool,
    leading: bool,
) -> None:
    """The mask equals that of `POST /segment`, in JSON or binary, and has the input's rank."""
    pixels = PHOTO[None] if leading else PHOTO
    result = client.infer(
        "tiny",
        [raw(pixels, binary=binary_in)],
        outputs=[wanted(binary=binary_out)],
        request_id="42",
    )
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "1", "42")
    assert [output["name"] for output in answer["outputs"]] == ["mask"]
    np.testing.assert_array_equal(result.as_numpy("mask"), mask[None] if leading else mask)
    assert result.as_numpy("mask").dtype == np.uint8


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_file_in_mask_out(client: Any, mask: Pixels, shape: tuple[int, ...]) -> None:  # noqa: ANN401
    """BYTES may be an image file, with or without a leading 1."""
    result = client.infer("tiny", [encoded(shape=shape)], outputs=[wanted()])
    np.testing.assert_array_equal(result.as_numpy("mask").reshape(mask.shape), mask)
    assert result.as_numpy("mask").ndim == 1 + len(shape)


def test_without_a_list_of_outputs_all_are_answered(client: Any, mask: Pixels) -> None:  # noqa: ANN401
    """The protocol's default is all outputs; the client then requests binary data."""
    result = client.infer("tiny", [raw()])
    np.testing.assert_array_equal(result.as_numpy("mask"), mask)
    confidence = result.as_numpy("confidence")
    assert confidence.shape == mask.shape
    assert confidence.dtype == np.uint8
    assert 255 / 21 < confidence.mean() <= 255
    assert "id" not in result.get_response()


def test_one_output_binary_and_one_not(client: Any, mask: Pixels) -> None:  # noqa: ANN401
    """Outputs have the requested order and format."""
    outputs = [wanted("confidence", binary=False), wanted("mask")]
    result = client.infer("tiny", [raw()], outputs=outputs)
    forms = {one["name"]: "data" in one for one in result.get_response()["outputs"]}
    assert list(forms.items()) == [("confidence", True), ("mask", False)]
    np.testing.assert_array_equal(result.as_numpy("mask"), mask)
    whole = client.infer("tiny", [raw()]).as_numpy("confidence")
    np.testing.assert_array_equal(result.as_numpy("confidence"), whole)


def test_another_model_and_a_version(client: Any, mask: Pixels) -> None:  # noqa: ANN401
    """The path selects the model; a request loads one that is not in memory."""
    result = client.infer("second", [raw()], model_version="1", outputs=[wanted()])
    assert result.get_response()["model_name"] == "second"
    np.testing.assert_array_equal(result.as_numpy("mask"), mask)


def test_a_larger_max_side_does_not_change_the_size(client: Any, mask: Pixels) -> None:  # noqa: ANN401
    """`max_side` is a parameter of the request; a value out of range is an error."""
    result = client.infer("tiny", [raw()], outputs=[wanted()], parameters={"max_side": 192})
    assert result.as_numpy("mask").shape == mask.shape
    with pytest.raises(InferenceServerException, match="max_side") as caught:
        client.infer("tiny", [raw()], parameters={"max_side": 1})
    assert caught.value.status() == "422"


def test_many_at_once(client: Any, mask: Pixels) -> None:  # noqa: ANN401
    """The client's asynchronous calls work."""
    calls = [client.async_infer("tiny", [raw()], outputs=[wanted()]) for _ in range(4)]
    for call in calls:
        np.testing.assert_array_equal(call.get_result().as_numpy("mask"), mask)


@pytest.mark.parametrize(
    ("model", "version", "tensor", "status", "message"),
    [
        ("third", "", raw(), "404", "no model 'third'; there are tiny, second"),
        ("tiny", "2", raw(), "404", "no version '2'; its version is 1"),
        ("tiny", "", raw(PHOTO[..., :2]), "400", "height, width, 3"),
        ("tiny", "", raw(np.stack([PHOTO, PHOTO])), "400", "1, height, width, 3"),
        ("tiny", "", raw(np.zeros((1001, 1000, 3), np.uint8)), "413", "at most 1000000"),
        ("tiny", "", encoded(b"hello"), "415", "not an image"),
        ("tiny", "", encoded(PNG[:100]), "422", "broken, truncated"),
        ("tiny", "", encoded(shape=(1, 1, 1)), "400", "shape"),
    ],
)
def test_errors_as_the_client_reads_them(
    client: Any,  # noqa: ANN401
    model: str,
    version: str,
    tensor: Any,  # noqa: ANN401
    status: str,
    message: str,
) -> None:
    """The client's exception carries the service's message and status."""
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(model, [tensor], model_version=version)
    assert caught.value.status() == status


# ---- raw requests -----------------------------------------------------------------------------


@pytest.fixture
async def service(make_settings: Callable[..., Settings]) -> AsyncIterator[InProcess]:
    """The app with low limits: twice the photo's pixels."""
    async with in_process(make_settings(max_bytes=30_000, max_pixels=12_288)) as running:
        yield running


def request(**changes: object) -> dict[str, Any]:
    """A request in JSON; ``changes`` replace members of its tensor, None removes one."""
    data = PHOTO.reshape(-1).tolist()
    tensor = {"name": "image", "shape": [HEIGHT, WIDTH, 3], "datatype": "UINT8", "data": data}
    changed = {**tensor, **changes}
    return {"inputs": [{name: value for name, value in changed.items() if value is not None}]}


def assert_error(response: httpx.Response, status: int) -> str:
    """Assert an error in the protocol's format; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-ID"]
    body = response.json()
    assert list(body) == ["error"]
    assert 0 < len(body["error"]) < 500
    return str(body["error"])


@pytest.mark.anyio
async def test_nested_pixels_and_base64(service: InProcess) -> None:
    """Nested pixels and base64 give the same answer; headers name the model and the timings."""
    text = base64.b64encode(PNG).decode()
    flat = await service.http.post(INFER, json=request())
    nested = await service.http.post(INFER, json=request(data=PHOTO.tolist()))
    bytes_ = request(data=[text], shape=[1], datatype="BYTES")
    file = await service.http.post(INFER, json=bytes_)
    assert flat.status_code == 200, flat.text
    assert flat.json() == nested.json() == file.json()
    assert flat.headers["X-Model"] == "tiny/1"
    assert "infer;dur=" in flat.headers["Server-Timing"]


@pytest.mark.anyio
async def test_binary_output_for_the_whole_request(service: InProcess) -> None:
    """`binary_data_output` is the default for outputs without `binary_data`."""
    outputs = [{"name": "mask"}, {"name": "confidence", "parameters": {"binary_data": False}}]
    body = {**request(), "outputs": outputs, "parameters": {"binary_data_output": True}}
    response = await service.http.post(INFER, json=body)
    assert response.headers["Content-Type"] == OCTETS
    length = int(response.headers[LENGTH])
    first, second = json.loads(response.content[:length])["outputs"]
    assert first["parameters"] == {"binary_data_size": HEIGHT * WIDTH}
    assert len(response.content) == length + HEIGHT * WIDTH
    assert len(second["data"]) == HEIGHT * WIDTH


MALFORMED: dict[str, tuple[object, int]] = {
    "no object": ([1], 400),
    "no inputs": ({}, 400),
    "null": (None, 400),
    "an empty list of inputs": ({"inputs": []}, 400),
    "another input": (request(name="photo"), 400),
    "two inputs": ({"inputs": request(data=[])["inputs"] * 2}, 400),
    "another datatype": (request(datatype="FP32"), 400),
    "no shape": (request(shape=None), 400),
    "no pixels": (request(shape=[0, 96, 3], data=[]), 400),
    "negative sizes": (request(shape=[-64, -96, 3]), 400),
    "a size that is no integer": (request(shape=[64.5, 96, 3]), 400),
    "an endless shape": (request(shape=[1] * 1000), 400),
    "other sizes than the data's": (request(shape=[HEIGHT, WIDTH - 1, 3]), 400),
    "more pixels than allowed": (request(shape=[128, 97, 3]), 413),
    "more pixels than there are numbers": (request(shape=[2**30, 2**30, 3]), 413),
    "sizes of a thousand digits": (request(shape=[10**1000, 10**1000, 3]), 400),
    "no data": (request(data=None), 400),
    "data as text": (request(data="abc"), 400),
    "numbers above 255": (request(data=[256] * PHOTO.size), 400),
    "negative numbers": (request(data=[[-1] * PHOTO.size]), 400),
    "fractions": (request(data=[0.5] * PHOTO.size), 400),
    "nested fractions": (request(data=[[0.5] * PHOTO.size]), 400),
    "huge numbers": (request(data=[[10**400]]), 400),
    "ragged data": (request(data=[[1], [1, 2]]), 400),
    "texts among the numbers": (request(data=[["a"] * PHOTO.size]), 400),
    "objects among the numbers": (request(data=[{}]), 400),
    "flags among the numbers": (request(data=[True] * 100), 400),
    "nothing among the numbers": (request(data=[None] * 100), 400),
    "a text, then numbers": (request(data=["a" * 10_000, *[1] * PHOTO.size]), 400),
    "numbers, then a list": (request(data=[*[1] * PHOTO.size, []]), 400),
    "lists, then a number": (request(data=[*[[1]] * PHOTO.size, 1]), 400),
    "rows of different lengths": (request(data=[[1] * 3, [1] * (PHOTO.size - 3)]), 400),
    "nested too deeply": (request(data=[[[[[1] * PHOTO.size]]]]), 400),
    "empty lists": (request(data=[[[]] * 100] * 100), 400),
    "both data and a size": (request(parameters={"binary_data_size": 3}), 400),
    "a size without data": (request(data=None, parameters={"binary_data_size": 3}), 400),
    "a size that is a flag": (request(data=None, parameters={"binary_data_size": False}), 400),
    "a size of a thousand digits": (
        request(data=None, parameters={"binary_data_size": 10**1000}),
        400,
    ),
    "a size that is no number": (request(data=None, parameters={"binary_data_size": "x"}), 400),
    "shared memory": (request(data=None, parameters={"shared_memory_region": "x"}), 400),
    "text that is not base64": (request(datatype="BYTES", shape=[1], data=["!"]), 400),
    "letters that are not ASCII": (request(datatype="BYTES", shape=[1], data=["ä"]), 400),
    "two files": (request(datatype="BYTES", shape=[2], data=["", ""]), 400),
    "a number for a file": (request(datatype="BYTES", shape=[1], data=[7]), 400),
    "an empty file": (request(datatype="BYTES", shape=[1], data=[""]), 415),
    "an output that is not there": ({**request(), "outputs": [{"name": "logits"}]}, 400),
    "an output twice": ({**request(), "outputs": [{"name": "mask"}] * 2}, 400),
    "classification": (
        {**request(), "outputs": [{"name": "mask", "parameters": {"classification": 3}}]},
        400,
    ),
    "a flag that is none": ({**request(), "parameters": {"binary_data_output": "yes"}}, 400),
    "an id that is none": ({**request(), "id": 7}, 400),
    "an id of a megabyte": ({**request(data=[]), "id": "7" * 2**16}, 400),
    "max_side of a thousand digits": ({**request(), "parameters": {"max_side": 10**1000}}, 422),
    "max_side as text": ({**request(), "parameters": {"max_side": "96"}}, 422),
    "max_side as a flag": ({**request(), "parameters": {"max_side": True}}, 422),
}


@pytest.mark.anyio
@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_requests(service: InProcess, case: str) -> None:
    """Malformed requests get a 4xx status in the protocol's format."""
    body, status = MALFORMED[case]
    assert_error(await service.http.post(INFER, content=json.dumps(body)), status)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b'{"inputs": NaN}',
        b'{"id": "\\ud800"}',
        b'{"inputs": [], "id": ' + b"9" * 5000 + b"}",
        PNG,
    ],
)
async def test_what_is_not_json(service: InProcess, content: bytes) -> None:
    """Any body that is not JSON gets 400."""
    assert_error(await service.http.post(INFER, content=content), 400)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("header", "size", "tail"),
    [
        ("x", 3, b"abc"),
        ("-1", 3, b"abc"),
        ("²", 3, b"abc"),
        ("9" * 5000, 3, b"abc"),
        ("99999", 3, b"abc"),
        ("0", 3, b"abc"),
        (None, 3, b"abc"),
        ("", PHOTO.size, b"abc"),
        ("", PHOTO.size, PHOTO.tobytes() + b"x"),
        ("", -1, PHOTO.tobytes()),
        ("", 0, b""),
    ],
)
async def test_binary_data_that_is_not_as_long_as_said(
    service: InProcess, header: str | None, size: int, tail: bytes
) -> None:
    """A wrong length gets 400. An empty ``header`` stands for the right value."""
    text = json.dumps(request(data=None, parameters={"binary_data_size": size})).encode()
    value = str(len(text)) if header == "" else header
    headers = [] if value is None else [(LENGTH.encode(), value.encode())]
    response = await service.http.post(INFER, content=text + tail, headers=headers)
    assert_error(response, 400)


@pytest.mark.anyio
@pytest.mark.parametrize("tail", [b"", b"\1\0", b"\5\0\0\0abcd", b"\3\0\0\0abcd"])
async def test_bytes_whose_length_is_wrong(service: InProcess, tail: bytes) -> None:
    """A wrong length before the file gets 400."""
    parameters = {"binary_data_size": len(tail)}
    body = request(data=None, datatype="BYTES", shape=[1], parameters=parameters)
    text = json.dumps(body).encode()
    response = await service.http.post(INFER, content=text + tail, headers={LENGTH: str(len(text))})
    assert_error(response, 400)


@pytest.mark.anyio
async def test_more_bytes_than_the_cap(service: InProcess) -> None:
    """A file over the limit gets 413, as binary data and as base64."""
    parameters = {"binary_data_size": 30_005}
    body = request(data=None, datatype="BYTES", shape=[1], parameters=parameters)
    text = json.dumps(body).encode()
    response = await service.http.post(
        INFER, content=text + bytes(30_005), headers={LENGTH: str(len(text))}
    )
    assert "30000 bytes" in assert_error(response, 413)
    long = request(datatype="BYTES", shape=[1], data=[base64.b64encode(bytes(30_001)).decode()])
    assert "30000 bytes" in assert_error(await service.http.post(INFER, json=long), 413)


@pytest.mark.anyio
async def test_an_endless_body_is_not_read_to_its_end(service: InProcess) -> None:
    """A body without Content-Length gets 413 as soon as it exceeds the limit."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 10_000
            assert taken < 1_000_000
            yield bytes(10_000)

    assert_error(await service.http.post(INFER, content=endless()), 413)


@pytest.mark.anyio
async def test_json_that_would_take_too_much_memory(
    make_settings: Callable[..., Settings],
) -> None:
    """Millions of JSON values get 413: two bytes of JSON can take hundreds of bytes of memory."""
    body = b'{"inputs": [' + b"[]," * 2_100_000 + b"[]]}"
    async with in_process(make_settings()) as service:
        error = assert_error(await service.http.post(INFER, content=body), 413)
    assert "send fewer, or binary data" in error


@pytest.mark.anyio
async def test_millions_of_errors(make_settings: Callable[..., Settings]) -> None:
    """Reading stops at the first of 2,000,000 wrong values; the answer names it."""
    body = b'{"inputs": [' + b"0," * 2_000_000 + b"0]}"
    async with in_process(make_settings()) as service:
        error = assert_error(await service.http.post(INFER, content=body), 400)
    assert error == "inputs.0: Input should be an object"


@pytest.mark.anyio
async def test_an_answer_too_long_for_json(make_settings: Callable[..., Settings]) -> None:
    """Two outputs of 18 megapixels are too many numbers; as binary data they fit."""
    photo = encode(np.zeros((3000, 6000, 3), np.uint8), "JPEG")
    body = request(data=[base64.b64encode(photo).decode()], shape=[1], datatype="BYTES")
    async with in_process(make_settings()) as service:
        error = assert_error(await service.http.post(INFER, json=body), 413)
        assert "ask for binary data" in error
        body["parameters"] = {"binary_data_output": True}
        response = await service.http.post(INFER, json=body)
    assert response.status_code == 200, response.text
    assert len(response.content) == int(response.headers[LENGTH]) + 2 * 3000 * 6000


@pytest.mark.anyio
async def test_a_compressed_body(service: InProcess) -> None:
    """A compressed body gets 415: its decompressed size has no limit."""
    response = await service.http.post(INFER, content=b"x", headers={"Content-Encoding": "gzip"})
    assert "Content-Encoding" in assert_error(response, 415)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/tiny/infer", 405),
        ("POST", "/v2", 405),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/third", 404),
        ("GET", "/v2/models/tiny/versions/2", 404),
        ("GET", "/v2/models/tiny/versions/2/ready", 404),
        ("POST", "/v2/models/third/infer", 404),
        ("POST", "/v2/models/..%2Ftiny/infer", 404),
        ("POST", "/v2/repository/models/tiny/load", 404),
    ],
)
async def test_paths_that_are_not_there(
    service: InProcess, method: str, path: str, status: int
) -> None:
    """Errors of routing have the protocol's format too."""
    assert_error(await service.http.request(method, path), status)


@pytest.mark.anyio
async def test_the_index_of_models_that_are_ready(service: InProcess) -> None:
    """The index works with and without a body; no model is ready while the service drains."""
    index = "/v2/repository/index"
    assert [one["state"] for one in (await service.http.post(index)).json()] == ["READY"]
    assert_error(await service.http.post(index, content=b"x"), 400)
    service.service.begin_draining()
    (entry,) = (await service.http.post(index)).json()
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "the service is draining")
    assert (await service.http.post(index, json={"ready": True})).json() == []


@pytest.mark.anyio
async def test_draining(service: InProcess) -> None:
    """A draining service is alive, not ready, and refuses requests with Retry-After."""
    service.service.begin_draining()
    assert (await service.http.get("/v2/health/live")).json() == {"live": True}
    for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready"):
        assert_error(await service.http.get(path), 503)
    refused = await service.http.post(INFER, json=request())
    assert_error(refused, 503)
    assert refused.headers["Retry-After"] == "1"
    assert (await service.http.get("/v2/models/tiny")).status_code == 200


@pytest.mark.anyio
async def test_overload(make_settings: Callable[..., Settings]) -> None:
    """A full queue answers 503 with Retry-After; the queued request still succeeds."""
    fake = FakeSession()
    async with in_process(make_settings(queue_size=1), fake) as service:
        fake.gate.clear()
        fake.started.clear()
        held = asyncio.create_task(service.http.post(INFER, json=request()))
        await asyncio.to_thread(fake.started.wait, 30)
        refused = await service.http.post(INFER, json=request())
        assert_error(refused, 503)
        assert int(refused.headers["Retry-After"]) >= 1
        fake.gate.set()
        assert (await held).status_code == 200


@pytest.mark.anyio
async def test_the_runtime_fails(make_settings: Callable[..., Settings]) -> None:
    """A runtime failure is 503 in the protocol's format and reveals no internals."""
    fake = FakeSession()
    async with in_process(make_settings(), fake) as service:
        fake.error = RuntimeError("secret")
        with structlog.testing.capture_logs() as lines:
            response = await service.http.post(INFER, json=request())
        assert "the batch failed" in [line["event"] for line in lines]
    assert "secret" not in assert_error(response, 503)


@pytest.mark.anyio
async def test_what_nobody_foresaw(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unforeseen error is 500 in the protocol's format and reveals no internals."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("secret")

    monkeypatch.setattr(Segmenter, "segment", fail)
    async with in_process(make_settings(), FakeSession()) as service:
        with structlog.testing.capture_logs() as lines:
            response = await service.http.post(INFER, json=request())
        assert "unforeseen error" in [line["event"] for line in lines]
    assert "secret" not in assert_error(response, 500)
