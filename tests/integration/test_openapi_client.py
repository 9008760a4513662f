"""The API's OpenAPI document: valid, complete, and enough to generate a client."""

import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.app import create_app
from service.artefact import voc
from service.settings import Settings
from tests.artefacts import encode, two_class_photo
from tests.clients import Server

PHOTO = encode(two_class_photo())

# The generator's configuration: it does not know zip archives, and its default hooks run commands
# that may not be on PATH.
GENERATOR = """
post_hooks: []
content_type_overrides:
  application/zip: application/octet-stream
  application/x-ndjson: application/octet-stream
"""

OWN_ERRORS = ("/v2", "/hf", "/label-studio")


@pytest.fixture
def description(make_settings: Callable[..., Settings]) -> dict[str, Any]:
    """The OpenAPI document."""
    return create_app(make_settings()).openapi()


def operations(description: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each operation and its path."""
    for path, methods in description["paths"].items():
        for operation in methods.values():
            yield path, operation


def test_the_description_is_valid_openapi(description: dict[str, Any]) -> None:
    """It is valid by the specification's schema, and every reference resolves."""
    assert description["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(description).validate()


def test_every_operation_is_described(description: dict[str, Any]) -> None:
    """Each operation has a unique id, a summary, a description and a tag."""
    names = [operation["operationId"] for _, operation in operations(description)]
    assert len(set(names)) == len(names)
    for path, operation in operations(description):
        assert operation["summary"], path
        assert operation["description"], path
        assert operation["tags"], path


def test_errors_have_their_protocols_format(description: dict[str, Any]) -> None:
    """Errors are RFC 9457's, except on the paths of other services' protocols."""
    for path, operation in operations(description):
        own = path.startswith(OWN_ERRORS)
        media_type = "application/json" if own else "application/problem+json"
        model = "ErrorMessage" if own else "Problem"
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                (form,) = response["content"].items()
                schema = {"$ref": f"#/components/schemas/{model}"}
                assert form == (media_type, {"schema": schema}), (path, status)


@pytest.fixture(scope="module")
def generated(protocol_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of an importable package generated from a server's OpenAPI document."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_bytes(httpx.get(f"{protocol_server.url}/openapi.json").content)
    (folder / "generator.yml").write_text(GENERATOR)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate"),
            *("--path", folder / "openapi.json", "--config", folder / "generator.yml"),
            *("--output-path", folder / "generated_client", "--meta", "none", "--fail-on-warning"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield "generated_client"
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("generated_client")]:
        del sys.modules[name]


@pytest.fixture
def call(generated: str, protocol_server: Server) -> Callable[..., Any]:
    """A function that calls an operation of the generated client by its module's name."""
    package = importlib.import_module(generated)

    def call(operation: str, *arguments: object, **options: object) -> Any:  # noqa: ANN401
        module = importlib.import_module(f"{generated}.api.{operation}")
        # The generated client parses JSON, and OpenAPI leaves Accept to its user.
        with package.Client(
            base_url=protocol_server.url,
            headers={"Accept": "application/json"},
            raise_on_unexpected_status=True,
        ) as client:
            return module.sync(*arguments, client=client, **options)

    return call


def test_the_generated_client_segments(call: Callable[..., Any], generated: str) -> None:
    """Form, parameters and response are typed."""
    models = importlib.import_module(f"{generated}.models")
    types = importlib.import_module(f"{generated}.types")
    file = types.File(payload=io.BytesIO(PHOTO), file_name="photo.png", mime_type="image/png")
    answer = call(
        "segmentation.segment",
        body=models.SegmentFilesBody(image=file),
        mask=models.SegmentMask.NONE,
        classes="person,cat",
    )
    assert isinstance(answer, models.Segmentation)
    assert (answer.width, answer.height, answer.model.name) == (96, 64, "tiny")
    assert {one.name for one in answer.classes} == {"person", "cat"}
    assert all(isinstance(one, models.SegmentedClass) for one in answer.classes)
    assert sum(one.fraction for one in answer.classes) < 1


def test_the_generated_client_sends_a_raw_body(call: Callable[..., Any], generated: str) -> None:
    """The image is the body; the response has run lengths."""
    types = importlib.import_module(f"{generated}.types")
    answer = call("segmentation.segment", body=types.File(payload=io.BytesIO(PHOTO)))
    assert {one.name for one in answer.classes} >= {"person", "cat", "background"}
    assert all(one.rle.size == [64, 96] and one.rle.counts for one in answer.classes)


def test_the_generated_client_reads_problems(call: Callable[..., Any], generated: str) -> None:
    """An error is a typed response too."""
    models = importlib.import_module(f"{generated}.models")
    types = importlib.import_module(f"{generated}.types")
    problem = call("segmentation.segment", body=types.File(payload=io.BytesIO(b"hello")))
    assert isinstance(problem, models.Problem)
    assert (problem.status, problem.type_) == (415, "/problems/unsupported-image-type")


def test_the_generated_client_reads_the_catalogue(call: Callable[..., Any]) -> None:
    """It reads classes and models."""
    labels = call("catalogue.classes")
    assert [one.name for one in labels.classes] == list(voc.CLASSES)
    assert labels.classes[15].color == [192, 128, 128]
    models = call("catalogue.models").models
    assert [(one.name, one.default) for one in models] == [("tiny", True), ("second", False)]


def test_the_generated_client_speaks_the_protocols(
    call: Callable[..., Any], generated: str
) -> None:
    """The document includes other services' protocols."""
    models = importlib.import_module(f"{generated}.models")
    metadata = call("open_inference_protocol.model_metadata", "tiny")
    assert [one.name for one in metadata.inputs] == ["image"]
    tensor = models.InputTensor(
        name="image",
        shape=list(two_class_photo().shape),
        datatype="UINT8",
        data=two_class_photo().reshape(-1).tolist(),
    )
    request = models.InferenceRequest(inputs=[tensor])
    answer = call("open_inference_protocol.infer", "tiny", body=request)
    assert [one.name for one in answer.outputs] == ["mask", "confidence"]
    missing = call("open_inference_protocol.model_metadata", "third")
    assert missing == models.ErrorMessage(error="no model 'third'; there are tiny, second")
