"""The same app on Ray Serve, for more than one machine.

There are two deployments. `Ingress` replicas run the whole app, including decoding and encoding,
but use a remote engine. `Device` replicas each have a model, on a GPU, a part of one, or CPU cores,
with the same batcher as a single machine. Ingresses send the network's input; devices return its
logits or masks.

No request is lost when a device dies: the ingress asks another one. Devices load a new model one
after the other (``reconfigure``). Each uses the old model until the new one is warm, so no request
is refused.

A Serve config file sets the number of replicas, their resources and their scaling; see
``docker/cluster.yaml``, which also has the commands. Its ``import_path`` is this module. Requires
the extra ``cluster``.
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
from service.inference.batcher import BatchResult
from service.inference.engine import Engine, Output, open_engine
from service.inference.engines import Engines
from service.inference.lanes import DeviceTask
from service.runtime import engine_families
from service.settings import Settings, load_settings
from service.telemetry import logs
from service.telemetry.metrics import Families, Metrics

_log: Any = structlog.get_logger("service.cluster")

ATTEMPTS: Final = 3
"""Devices that one photo may lose. After that, the photo is assumed to kill them."""

FAILURES: Final = 3
"""Consecutive failures after which a device is restarted."""

_PATIENCE_S: Final = 3.0


class Arguments(BaseModel):
    """The ``args`` of the Serve config file.

    ``settings``: ``FCN_*`` settings by their names without the prefix, for all replicas. The
    devices' model is set by their ``user_config`` instead: ``{"model": "artefact folder"}``.
    """

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """`service.inference.engine.ServedModel` of a model in a device's process."""

    contract: ModelContract
    manifest: Manifest
    file_name: str
    provider: str
    capacity: int
    gpu: None = None

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """Describe a device's engine."""
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
        """The sha256 of the network file, which identifies the model."""
        return self.manifest.files[self.file_name].sha256


@dataclass(frozen=True, slots=True)
class Reply:
    """A device's answer or error. ``model``: the device's, if the sender expected another one."""

    answer: BatchResult[Output] | SegmentError
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
        """Load a model. The previous one, if any, serves until the new one is warm.

        Raises what loading raises; Serve then restarts the replica and stops the rollout.
        """
        engine = await open_engine(self._settings, self._metrics, Path(user_config["model"]))
        previous, self._engine = self._engine, engine
        if previous is not None:
            await previous.batcher.close()

    async def check_health(self) -> None:
        """Raise if every photo fails or a batch hangs: a failed GPU needs a new process."""
        if self._failures >= FAILURES:
            raise InferenceFailed(f"{self._failures} photos in a row failed")
        if (
            self._engine is not None
            and self._engine.batcher.running_s > self._settings.hung_after_s
        ):
            raise InferenceFailed("a batch hangs")

    async def describe(self) -> RemoteModel:
        """Describe the model that this device runs."""
        return RemoteModel.of(self._ready())

    async def infer(self, task: DeviceTask, expected: str) -> Reply:
        """Run the network on a photo. ``expected``: sha256 of the model that the sender expects.

        The service's errors are returned, not raised: Ray would wrap each and log its traceback.
        """
        engine = self._ready()
        answer: BatchResult[Output] | SegmentError
        try:
            answer = await engine.batcher.submit(task, key=task.geometry.padded)
            self._failures = 0
        except SegmentError as exc:
            self._failures += isinstance(exc, InferenceFailed)
            answer = exc
        model = RemoteModel.of(engine)
        return Reply(answer, None if model.sha256 == expected else model)

    async def families(self) -> tuple[str, Families]:
        """This replica's name and metrics."""
        deadline_s = self._settings.deadline_s
        self._metrics.look_at_service(ready=True, in_flight=0, limit=0, deadline_s=deadline_s)
        return _replica(), await engine_families(self._metrics, [self._ready()])

    def _ready(self) -> Engine:
        assert self._engine is not None, "Serve calls reconfigure first"  # noqa: S101
        return self._engine


class RemoteQueue:
    """`service.inference.engine.Queue` in front of `Device` replicas."""

    def __init__(self, device: DeploymentHandle, model: RemoteModel) -> None:
        self._device = device
        self._expected = model
        self.engine = Engine(model, self)

    @property
    def waiting(self) -> int:
        """0: the devices count their own queues."""
        return 0

    @property
    def capacity(self) -> int:
        """Items that one device works on at once; the number of devices varies."""
        return self._expected.capacity

    @property
    def running_s(self) -> float:
        """0: the devices watch their own batches."""
        return 0.0

    @property
    def usual_s(self) -> float:
        """0: this process does not know how fast the devices are."""
        return 0.0

    def retry_after_s(self, ahead: int) -> float:
        """A second: this process does not know how fast the devices are."""
        return 1.0

    async def submit(self, item: DeviceTask, key: object) -> BatchResult[Output]:
        """Run the network on a device. If the device dies, use another one.

        Raises what a batcher raises, or `ModelUnavailable` if no device can be started.
        """
        for _ in range(ATTEMPTS):
            try:
                reply = await self._ask(item)
            except (RayActorError, ReplicaUnavailableError) as exc:
                _log.warning("device lost", reason=type(exc).__name__)
                continue
            except BackPressureError as exc:
                raise Overloaded(
                    "the queues of all devices are full", self.retry_after_s(1)
                ) from exc
            except DeploymentUnavailableError as exc:
                raise ModelUnavailable("no device could be started") from exc
            except RayTaskError as exc:
                raise InferenceFailed(f"the device failed: {type(exc.cause).__name__}") from exc
            if reply.model is not None and reply.model != self._expected:
                _log.info("model changed", model=reply.model.contract.version)
                self._expected = self.engine.model = reply.model
            if isinstance(reply.answer, SegmentError):
                raise reply.answer
            return reply.answer
        raise InferenceFailed(f"{ATTEMPTS} devices in a row died")

    def abandon(self) -> None:
        """Do nothing: the devices own the work."""

    async def close(self) -> None:
        """Do nothing: the devices own the work."""

    async def _ask(self, item: DeviceTask) -> Reply:
        response = self._device.infer.remote(item, self._expected.sha256)
        try:
            reply: Reply = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return reply


class ReplicaPeers:
    """`service.telemetry.metrics.Peers` that are the replicas of both deployments."""

    label: Final = "replica"

    def __init__(self, device: DeploymentHandle) -> None:
        self._device = device
        self.families: Callable[[], Awaitable[Families]] | None = None

    @contextlib.asynccontextmanager
    async def answering(self, families: Callable[[], Awaitable[Families]]) -> AsyncIterator[None]:
        """Store ``families``, which `Ingress.families` returns."""
        self.families = families
        yield

    async def gather(self) -> Mapping[str, Families | None]:
        """Ask all replicas that Serve knows; one that does not answer is left out."""
        context = serve.get_replica_context()
        ingress = serve.get_deployment_handle(context.deployment, context.app_name)
        asked = [
            handle.broadcast("families").results_async(
                timeout_s=_PATIENCE_S, return_exceptions=True
            )
            for handle in (ingress, self._device)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        received = [one for each in answers if isinstance(each, list) for one in each]
        return dict(sorted(one for one in received if isinstance(one, tuple)))


class Ingress:
    """The app, with a remote engine."""

    def __init__(self, settings: Settings, device: DeploymentHandle) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._device = device
        self._peers = ReplicaPeers(device)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Build the app. Serve calls this, then runs the app's lifespan."""
        open_engines = partial(_open_engines, self._device)
        app = create_app(self._settings, open_engines=open_engines, peers=self._peers)
        return _ServeAdapter(app)

    async def families(self) -> tuple[str, Families]:
        """This replica's name and metrics."""
        assert self._peers.families is not None, "the lifespan has begun"  # noqa: S101
        return _replica(), await self._peers.families()


class _ServeAdapter:
    """Adapts the app to Serve.

    Serve does not pass an app's lifespan state to its requests. It adds its own request id to each
    response, so the app's is removed.
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
    """Build the application that a Serve config file names. ``arguments``: see `Arguments`.

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
        # Above the app's own limit, so that the app refuses requests, not Serve.
        max_ongoing_requests=512,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.deadline_s + 10,
    )
    return ingress.bind(settings, device.bind(settings))


async def _open_engines(device: DeploymentHandle, settings: Settings, metrics: Metrics) -> Engines:
    """Open the engine of an ingress. Waits for the first device."""
    model: RemoteModel = await device.describe.remote()
    engine = RemoteQueue(device, model).engine
    load = partial(open_engine, settings, metrics)
    return Engines(engine, settings.model, load, 0, metrics.reload)


def _replica() -> str:
    found = serve.get_replica_context().replica_id
    return f"{found.deployment_id.name}-{found.unique_id}"
