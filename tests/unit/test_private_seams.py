"""Every private or undocumented part of a third-party library that the service relies on.

A library may change these in any release, without notice. A failure here names the part and what
stops working: adapt that module, or narrow the range in ``pyproject.toml``. What these tests cannot
see, such as the bytes that uvicorn writes, is covered by ``tests/integration``.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httptools
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.params import Depends
from limits.storage import Storage
from PIL import _imaging
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from starlette.requests import Request
from starlette.staticfiles import StaticFiles
from uvicorn import _types as uvicorn_types
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.server.connections import Connection

with warnings.catch_warnings():
    # Ray's own use of pydantic.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray import serve
    from ray.serve.context import ReplicaContext
    from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle

CONNECTIONS = "service/server/connections.py cannot guard connections"
SERVING = "service/server/serving.py cannot start or stop in order"
METRICS = "GET /metrics cannot merge the metrics of several processes"
CLUSTER = "service/cluster.py cannot run on Ray Serve"


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, without ``self``."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


# ---- uvicorn -------------------------------------------------------------------------------------

PROTOCOL_METHODS = {
    "connection_made": ["transport"],
    "connection_lost": ["exc"],
    "eof_received": [],
    "data_received": ["data"],
    "on_message_begin": [],
    "on_url": ["url"],
    "on_header": ["name", "value"],
    "on_headers_complete": [],
    "on_body": ["body"],
    "on_message_complete": [],
    "on_response_complete": [],
    "timeout_keep_alive_handler": [],
    "_start_asgi_task": ["cycle", "app"],
}


@pytest.mark.parametrize("name", PROTOCOL_METHODS)
def test_methods_that_the_connection_overrides(name: str) -> None:
    """Each exists in uvicorn with the same parameters."""
    method = getattr(HttpToolsProtocol, name, None)
    assert method and parameters(method) == PROTOCOL_METHODS[name], f"{name}: {CONNECTIONS}"


def test_every_overridden_method_is_listed_here() -> None:
    """A new override needs an entry above."""
    own = {name for name, value in vars(Connection).items() if inspect.isfunction(value)}
    overridden = {name for name in own if hasattr(HttpToolsProtocol, name)} - {"__init__"}
    assert overridden == set(PROTOCOL_METHODS)


async def _app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401
    raise AssertionError


def test_uvicorn_takes_a_factory_as_its_protocol() -> None:
    """`serve` passes a partial where uvicorn documents a class."""
    factory: Any = partial(HttpToolsProtocol)
    config = uvicorn.Config(_app, http=factory, log_config=None)
    config.load()
    assert config.http_protocol_class is factory, f"Config.http: {SERVING}"


@pytest.mark.parametrize(
    "name",
    [
        *("_unset_keepalive_if_required", "access_log", "access_logger", "app", "client", "cycle"),
        *("flow", "headers", "logger", "loop", "parser", "pipeline", "scope", "server"),
        *("server_state",),
        *("timeout_keep_alive_task", "transport", "url"),
    ],
)
@pytest.mark.anyio
async def test_attributes_that_the_connection_uses(name: str) -> None:
    """A protocol is made with these arguments, and has each attribute when a request begins."""
    config = uvicorn.Config(_app, http=HttpToolsProtocol, log_config=None)
    config.load()
    protocol = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
    protocol.on_message_begin()
    assert hasattr(protocol, name), f"HttpToolsProtocol.{name}: {CONNECTIONS}"


def test_the_keep_alive_timer_can_be_cleared() -> None:
    """It takes no arguments."""
    found = parameters(HttpToolsProtocol._unset_keepalive_if_required)
    assert found == [], f"_unset_keepalive_if_required: {CONNECTIONS}"


CYCLE_PARAMETERS = [
    *("scope", "transport", "flow", "logger", "access_logger", "access_log"),
    *("default_headers", "message_event", "expect_100_continue", "keep_alive", "on_response"),
]


def test_a_response_without_a_request_can_be_started() -> None:
    """A cycle takes exactly the arguments that the connection gives it."""
    found = parameters(RequestResponseCycle)
    assert found == CYCLE_PARAMETERS, f"RequestResponseCycle: {CONNECTIONS}"


@pytest.mark.parametrize(
    "name",
    [
        *("scope", "keep_alive", "more_body", "response_started", "response_complete"),
        *("message_event", "disconnected"),
    ],
)
def test_attributes_of_a_cycle(name: str) -> None:
    """The connection reads and sets them."""
    cycle = RequestResponseCycle(**dict.fromkeys(CYCLE_PARAMETERS))  # type: ignore[arg-type]
    assert hasattr(cycle, name), f"RequestResponseCycle.{name}: {CONNECTIONS}"


@pytest.mark.anyio
async def test_the_last_response_says_that_it_is() -> None:
    """From release 0.53 on uvicorn adds ``Connection: close`` where ``keep_alive`` is false."""
    transport = Mock()
    cycle = RequestResponseCycle(
        **{  # type: ignore[arg-type]
            **dict.fromkeys(CYCLE_PARAMETERS),
            "scope": {"method": "GET"},
            "transport": transport,
            "flow": Mock(write_paused=False),
            "default_headers": [],
            "keep_alive": False,
        }
    )
    await cycle.send({"type": "http.response.start", "status": 200, "headers": []})
    assert b"connection: close" in transport.write.call_args.args[0], (
        f"Connection: close: {CONNECTIONS}"
    )


@pytest.mark.anyio
async def test_a_response_waits_for_its_client() -> None:
    """A piece is not written while the transport has paused writing."""
    flow = Mock(write_paused=True)
    flow.drain.side_effect = ConnectionAbortedError
    arguments: dict[str, Any] = {**dict.fromkeys(CYCLE_PARAMETERS), "flow": flow}
    cycle = RequestResponseCycle(**arguments)
    with pytest.raises(ConnectionAbortedError):
        await cycle.send({"type": "http.response.body", "body": b"", "more_body": True})
    assert flow.drain.called, f"FlowControl.drain: {CONNECTIONS}"


def test_default_headers_of_a_server() -> None:
    """The connection gives them to its own cycles."""
    assert ServerState().default_headers == [], f"ServerState.default_headers: {CONNECTIONS}"


@pytest.mark.parametrize(
    "name",
    [
        *("ASGI3Application", "ASGIReceiveCallable", "ASGIReceiveEvent"),
        *("ASGISendCallable", "ASGISendEvent", "HTTPResponseBodyEvent", "Scope"),
    ],
)
def test_private_types_of_uvicorn(name: str) -> None:
    """`service.server.connections` imports them."""
    assert hasattr(uvicorn_types, name), f"uvicorn._types.{name}: {CONNECTIONS}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("startup", ["sockets"]),
        ("shutdown", ["sockets"]),
        ("capture_signals", []),
        ("handle_exit", ["sig", "frame"]),
    ],
)
def test_methods_of_the_server(name: str, expected: list[str]) -> None:
    """`serve` overrides or calls each."""
    method = getattr(uvicorn.Server, name, None)
    assert method and parameters(method) == expected, f"Server.{name}: {SERVING}"


@pytest.mark.anyio
async def test_attributes_of_a_running_server() -> None:
    """What `serve` reads while it stops: listening sockets, and arguments for late connections."""

    class Stopped(uvicorn.Server):
        async def main_loop(self) -> None:
            found = {name for name in ("servers", "server_state") if hasattr(self, name)}
            found |= {"lifespan.state"} if isinstance(self.lifespan.state, dict) else set()
            assert found == {"servers", "server_state", "lifespan.state"}, SERVING

    config = uvicorn.Config(
        _app, port=0, lifespan="off", log_config=None, log_level=logging.CRITICAL
    )
    await Stopped(config).serve()


def test_the_parser_keeps_the_error_of_a_callback() -> None:
    """As its own error's context, which the connection responds with."""

    class Callbacks:
        def on_url(self, url: bytes) -> None:
            raise ValueError("mine")

    with pytest.raises(httptools.HttpParserError) as caught:
        httptools.HttpRequestParser(Callbacks()).feed_data(b"GET / HTTP/1.1\r\n")
    assert str(caught.value.__context__) == "mine", f"HttpParserError.__context__: {CONNECTIONS}"


# ---- FastAPI and Starlette -----------------------------------------------------------------------


def test_the_lifespan_can_be_run_without_a_server() -> None:
    """`serve` runs it itself, so that a failed start prints one line."""
    assert callable(FastAPI().router.lifespan_context), f"router.lifespan_context: {SERVING}"


@pytest.mark.anyio
async def test_the_scope_has_the_route() -> None:
    """FastAPI puts it there, with its path template."""
    app = FastAPI()
    paths = []

    @app.get("/models/{name}")
    async def model(request: Request) -> None:
        paths.append(request.scope["route"].path)

    async def ignore(_: object) -> None:
        return

    scope = {"type": "http", "method": "GET", "path": "/models/x", "query_string": b""}
    await app({**scope, "headers": []}, None, ignore)  # type: ignore[arg-type]
    assert paths == ["/models/{name}"], 'scope["route"]: metrics and log cannot name a route'


def test_dependencies_have_a_class() -> None:
    """`service.http.access` annotates with it; FastAPI documents the function only."""
    assert inspect.isclass(Depends), "fastapi.params.Depends: service/http/access.py fails"


def test_files_are_answered_by_one_method() -> None:
    """The page's headers are added there."""
    found = parameters(StaticFiles.file_response)
    expected = ["full_path", "stat_result", "scope", "status_code"]
    assert found == expected, "StaticFiles.file_response: the page loses its security headers"


def test_swagger_ui_is_where_the_docs_look() -> None:
    """Of ``fastapi_swagger`` only its files are used."""
    folder = resources.files("fastapi_swagger") / "resources"
    names = {entry.name for entry in folder.iterdir()}
    expected = {"swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"}
    assert expected <= names, "fastapi_swagger/resources: GET /docs is empty"


# ---- Pillow --------------------------------------------------------------------------------------


def test_libtiff_can_be_silenced() -> None:
    """Pillow's extension module exports libtiff's function."""
    library = ctypes.CDLL(_imaging.__file__)
    assert hasattr(library, "TIFFSetErrorHandler"), "a broken TIFF writes to stderr"


# ---- ONNX Runtime --------------------------------------------------------------------------------


def test_the_fallback_to_the_cpu_can_be_switched_off(tiny_artefact: Path) -> None:
    """By an argument that only the source documents."""
    network = tiny_artefact / "network.onnx"
    session = ort.InferenceSession(
        network, providers=["CPUExecutionProvider"], enable_fallback=False
    )
    assert session._enable_fallback is False, "enable_fallback: a GPU's failure goes unnoticed"


def test_nodes_report_their_provider(tiny_artefact: Path) -> None:
    """With a session option that records it."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(
        tiny_artefact / "network.onnx", options, providers=["CPUExecutionProvider"]
    )
    found = {
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }
    assert ("CPUExecutionProvider", "Conv") in found, "nodes left to the CPU go unnoticed"


def test_libraries_of_providers_are_in_one_folder() -> None:
    """Loading one by hand tells why ONNX Runtime could not."""
    assert (Path(ort.__file__).parent / "capi").is_dir(), "onnxruntime/capi: the reason is lost"


# ---- metrics, rate limits, Ray -------------------------------------------------------------------


def test_metric_families_can_be_built() -> None:
    """Those of other processes are."""
    family = Metric("name", "documentation", "gauge")
    family.add_sample("name", {"worker": "0"}, 1.0)
    (sample,) = family.samples
    found = (family.name, family.documentation, family.type, sample.name, sample.labels)
    assert found == ("name", "documentation", "gauge", "name", {"worker": "0"}), METRICS


def test_the_encoder_is_chosen_by_accept() -> None:
    """And comes with its media type."""
    encoder, media_type = choose_encoder("")
    assert encoder.__module__ and media_type.startswith("text/plain"), METRICS


def test_storage_of_rate_limits_need_not_be_registered() -> None:
    """A storage without a scheme is not in the library's global registry."""

    class Unregistered(Storage):
        STORAGE_SCHEME = None

    found = Unregistered.__abstractmethods__
    expected = {"base_exceptions", "check", "clear", "get", "get_expiry", "incr", "reset"}
    assert found == expected, "limits.storage.Storage: service/access.py cannot count requests"


def test_ray_takes_an_app_from_a_method() -> None:
    """`Ingress` builds its app in the replica."""

    class Ingress:
        def __serve_build_asgi_app__(self) -> None: ...

    assert issubclass(serve.ingress()(Ingress), Ingress), f"serve.ingress(): {CLUSTER}"


def test_ray_asks_all_replicas() -> None:
    """For their metrics."""
    found = (
        parameters(DeploymentHandle.broadcast)[0],
        parameters(DeploymentBroadcastResponse.results_async),
    )
    expected = ("method_name", ["timeout_s", "return_exceptions"])
    assert found == expected, f"DeploymentHandle.broadcast: {CLUSTER}"


def test_a_replica_knows_its_names() -> None:
    """They are the values of the label ``replica``."""
    names = {"replica_id", "app_name", "deployment"}
    found = {*inspect.get_annotations(ReplicaContext), *vars(ReplicaContext)}
    assert names <= found, f"ReplicaContext: {CLUSTER}"
