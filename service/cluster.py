"""The same app on Ray Serve, for more than one machine.

Two deployments. `Ingress` replicas are the app as it is, decoding and encoding, but their engine is
elsewhere; `Device` replicas have a model each, on a GPU, a part of one, or CPU cores, with the
batcher that a single machine has too. Between them go the network's input and its logits or masks.

A device that dies takes no request with it: whoever waits for it asks another one. A new model is
taken up by the devices one after the other (``reconfigure``), each answering with the old one until
the new one is warm, so nothing is refused meanwhile.

How many replicas, on what, and by which load they grow is said in a Serve config file, such as
``docker/cluster.yaml``; see there for the commands. This module is its ``import_path``. Needs the
extra ``cluster``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import structlog
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.artefact.contract import ModelContract
from service.artefact.manifest import Manifest
from service.errors import InferenceFailed, ModelUnavailable, Overloaded, SegmentError
from service.http.observation import REQUEST_ID_HEADER
from service.inference.batcher import Answer
from service.inference.engine import Engine, Output, open_engine
from service.inference.engines import Engines
from service.inference.lanes import Task
from service.routes.metrics import engine_families
from service.settings import Settings, load_settings
from service.telemetry import logs
from service.telemetry.metrics import Families, Metrics

_log: Any = structlog.get_logger("service.cluster")

ATTEMPTS: Final = 3
"""Devices that one photo may be lost with: more, and it is the photo that kills them."""

FAILURES: Final = 3
"""Failed batches without one that succeeds, after which a device is started again."""

_PATIENCE_S: Final = 3.0


class Arguments(BaseModel):
    """The ``args`` of the Serve config file.

    ``settings``: ``FCN_*`` by their names without the prefix, for all replicas. The model is not
    among them: it is the devices' ``user_config``, ``{"model": "artefact folder"}``.
    """

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """`service.inference.engine.ServedModel` of a model that is in a device's process."""

    contract: ModelContract
    manifest: Manifest
    file_name: str
    provider: str
    capacity: int
    gpu: None = None

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """What a device tells of its engine."""
        model = engine.model
        return cls(
            model.contract,
            model.manifest,
            model.file_name,
            model.provider,
            engine.batcher.capacity,
        )

    @property
    def sha256(self) -> str:
        """Of the network file: two models are the same where this is."""
        return self.manifest.files[self.file_name].sha256


@dataclass(frozen=True, slots=True)
class Reply:
    """A device's answer, or why it has none; ``model`` where another one was expected."""

    answer: Answer[Output] | SegmentError
    model: RemoteModel | None


class Device:
    """Runs the network: one engine, in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._metrics = Metrics()
        self._engine: Engine | None = None
        self._failures = 0

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Take up a model. The one before, if any, answers until the new one is warm.

        Raises what loading raises; then Serve starts the replica anew, and stops rolling out.
        """
        engine = await open_engine(self._settings, self._metrics, Path(user_config["model"]))
        previous, self._engine = self._engine, engine
        if previous is not None:
            await previous.batcher.close()

    async def check_health(self) -> None:
        """Raise if nothing succeeds any more: a GPU that has failed stays so for its process."""
        if self._failures >= FAILURES:
            raise InferenceFailed(f"{self._failures} photos in a row failed")
        if (
            self._engine is not None
            and self._engine.batcher.running_s > self._settings.hung_after_s
        ):
            raise InferenceFailed("a batch hangs")

    async def describe(self) -> RemoteModel:
        """Tell what it runs."""
        return RemoteModel.of(self._ready())

    async def infer(self, task: Task, expected: str) -> Reply:
        """Run the network on a photo; ``expected``: the sha256 of the model that its sender knows.

        Errors of the service come as values: Ray would wrap them, and log each with its traceback.
        """
        engine = self._ready()
        answer: Answer[Output] | SegmentError
        try:
            answer = await engine.batcher.submit(task, key=task.geometry.padded)
            self._failures = 0
        except SegmentError as exc:
            self._failures += isinstance(exc, InferenceFailed)
            answer = exc
        model = RemoteModel.of(engine)
        return Reply(answer, None if model.sha256 == expected else model)

    async def families(self) -> tuple[str, Families]:
        """The replica's name and metrics."""
        deadline_s = self._settings.deadline_s
        self._metrics.look_at_service(ready=True, in_flight=0, limit=0, deadline_s=deadline_s)
        return _replica(), await engine_families(self._metrics, [self._ready()])

    def _ready(self) -> Engine:
        assert self._engine is not None, "Serve calls reconfigure first"  # noqa: S101
        return self._engine


class RemoteQueue:
    """`service.inference.engine.Queue` whose devices are `Device` replicas behind a handle."""

    def __init__(self, device: DeploymentHandle, model: RemoteModel) -> None:
        self._device = device
        self._expected = model
        self.engine = Engine(model, self)

    @property
    def waiting(self) -> int:
        """None in this process: the devices count theirs."""
        return 0

    @property
    def capacity(self) -> int:
        """What one device works on at once; how many there are changes."""
        return self._expected.capacity

    @property
    def running_s(self) -> float:
        """Nothing runs in this process: the devices watch their own batches."""
        return 0.0

    def retry_after_s(self, ahead: int) -> float:
        """A second: how fast the devices are is not known here."""
        return 1.0

    async def submit(self, item: Task, key: object) -> Answer[Output]:
        """Have some device run the network; when it dies meanwhile, another one.

        Raises what a batcher raises, or `ModelUnavailable` if no device can be started.
        """
        for _ in range(ATTEMPTS):
            try:
                reply = await self._ask(item)
            except (RayActorError, ReplicaUnavailableError) as exc:
                _log.warning("device lost", reason=type(exc).__name__)
                continue
            except BackPressureError as exc:
                raise Overloaded("the devices' queues are full", self.retry_after_s(1)) from exc
            except DeploymentUnavailableError as exc:
                raise ModelUnavailable("no device can be started") from exc
            except RayTaskError as exc:
                raise InferenceFailed(f"the device failed: {type(exc.cause).__name__}") from exc
            if reply.model is not None and reply.model != self._expected:
                _log.info("model changed", model=reply.model.contract.version)
                self._expected = self.engine.model = reply.model
            if isinstance(reply.answer, SegmentError):
                raise reply.answer
            return reply.answer
        raise InferenceFailed(f"{ATTEMPTS} devices were lost one after the other")

    def abandon(self) -> None:
        """Nothing is this process's own."""

    async def close(self) -> None:
        """Nothing is this process's own."""

    async def _ask(self, item: Task) -> Reply:
        response = self._device.infer.remote(item, self._expected.sha256)
        try:
            reply: Reply = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return reply


class ReplicaPeers:
    """`service.telemetry.metrics.Peers` that are replicas of both deployments."""

    label: Final = "replica"

    def __init__(self, device: DeploymentHandle) -> None:
        self._device = device
        self.families: Callable[[], Awaitable[Families]] | None = None

    @contextlib.asynccontextmanager
    async def answering(self, families: Callable[[], Awaitable[Families]]) -> AsyncIterator[None]:
        """Keep what `Ingress.families` answers with."""
        self.families = families
        yield

    async def gather(self) -> Mapping[str, Families | None]:
        """Ask all that Serve knows of; one that does not answer is left out."""
        context = serve.get_replica_context()
        ingress = serve.get_deployment_handle(context.deployment, context.app_name)
        asked = [
            handle.broadcast("families").results_async(
                timeout_s=_PATIENCE_S, return_exceptions=True
            )
            for handle in (ingress, self._device)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        told = [one for each in answers if isinstance(each, list) for one in each]
        return dict(sorted(one for one in told if isinstance(one, tuple)))


class Ingress:
    """The app, with its engine elsewhere."""

    def __init__(self, settings: Settings, device: DeploymentHandle) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._device = device
        self._peers = ReplicaPeers(device)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve, which also runs the lifespan."""
        open_engines = partial(_open_engines, self._device)
        app = create_app(self._settings, open_engines=open_engines, peers=self._peers)
        return _AsServeHasIt(app)

    async def families(self) -> tuple[str, Families]:
        """The replica's name and metrics."""
        assert self._peers.families is not None, "the lifespan has begun"  # noqa: S101
        return _replica(), await self._peers.families()


class _AsServeHasIt:
    """What a server does with an app's lifespan state, and Serve does not.

    The request id is left to Serve, which puts it into both heads itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._state: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app({**scope, "state": self._state}, receive, send)
            return

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID_HEADER]
            await send(message)

        await self._app({**scope, "state": {**self._state}}, receive, send_without_id)


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application that a Serve config file names; ``arguments`` are `Arguments`.

    Raises `SettingsError`, or pydantic's `ValidationError`.
    """
    given = Arguments.model_validate(arguments).settings
    settings = load_settings({"models_memory_mb": 0, **given})
    device = serve.deployment(
        Device,
        max_ongoing_requests=64,
        user_config={"model": str(settings.model.resolve())},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.deadline_s + 10,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        # Above what the app takes in at once, so that it is the app that refuses.
        max_ongoing_requests=512,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.deadline_s + 10,
    )
    return ingress.bind(settings, device.bind(settings))


async def _open_engines(device: DeploymentHandle, settings: Settings, metrics: Metrics) -> Engines:
    """The engine of an ingress; waits for the first device."""
    model: RemoteModel = await device.describe.remote()
    engine = RemoteQueue(device, model).engine
    load = partial(open_engine, settings, metrics)
    return Engines(engine, settings.model, load, 0, metrics.reload)


def _replica() -> str:
    found = serve.get_replica_context().replica_id
    return f"{found.deployment_id.name}-{found.unique_id}"
