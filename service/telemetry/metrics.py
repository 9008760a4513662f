"""The service's metrics, for Prometheus.

A `Metrics` owns its registry: nothing here is global, so several apps can share one process.
Requests only increment counters and histograms. Everything that can be read instead (queues, loaded
models, a GPU's memory) is read when Prometheus scrapes.

Several processes behind one port have a registry each, and a scrape reaches any one of them. That
process gathers the families of its peers and adds a label to tell them apart (`Peers`).
prometheus_client's multiprocess mode, with files that all processes map into memory, was rejected:
it has no process metrics, its gauges are only as fresh as their last change, a dead process's
numbers stay, and each observation costs twice as much.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service.system import memory_limit_bytes

Families = list[Metric]
"""Metric families with their samples, as registries collect them."""

OTHER: Final = "other"
"""Label value for a path without a route, or an unknown method."""

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

STAGES: Final = ("read", "decode", "preprocess", "queue", "infer", "upsample", "encode")

DIED: Final = "died"
HUNG: Final = "hung"
"""Why a worker was restarted."""

# From the time of one stage of a small photo up to the default deadline.
SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_BATCH_SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_PIXELS: Final = (1e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 8e6, 1.2e7, 2.4e7, 5e7)
_BYTES: Final = (1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 2.5e6, 5e6, 1e7, 2e7)


WORKERS_LOST: Final = ("killed", "TooExpensive", "UndecodableImage")
"""Why image workers end under their work: by others, or by the error that the photo got."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Facts reported about a loaded model.

    ``waiting``: photos in its queue; ``gpu``: its GPU's number; ``memory``: used and total bytes of
    that GPU. Both are None on a CPU.
    """

    name: str
    version: str
    precision: str
    provider: str
    waiting: int
    gpu: int | None = None
    memory: tuple[int, int] | None = None


class Metrics:
    """Every metric of one app, in a registry of its own.

    ``reasons``: all possible reasons of refusals. Their counters start at 0, so that the first
    refusal is visible as an increase.
    """

    def __init__(self, reasons: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        registry = self.registry
        self._requests = Counter(
            "fcn_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self._refusals = Counter(
            "fcn_refusals",
            "Problems in responses, of requests and of single photos in them, by type.",
            ["reason"],
            registry=registry,
        )
        for reason in reasons:
            self._refusals.labels(reason)
        self._request_seconds = Histogram(
            "fcn_request_seconds",
            "Time from a request's head to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        stage_seconds = Histogram(
            "fcn_stage_seconds",
            "Time of one stage of one photo; `read`: until the request's body has arrived.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self._photo_pixels = Histogram(
            "fcn_photo_pixels", "Pixels of a photo.", buckets=_PIXELS, registry=registry
        )
        self._photo_bytes = Histogram(
            "fcn_photo_bytes", "Bytes of a photo's file.", buckets=_BYTES, registry=registry
        )
        self._batch_size = Histogram(
            "fcn_batch_size",
            "Photos in one run of the network.",
            buckets=_BATCH_SIZES,
            registry=registry,
        )
        reloads = Counter(
            "fcn_reloads",
            "Attempts to reload a model, by outcome.",
            ["outcome"],
            registry=registry,
        )
        self._reloads = {
            taken: reloads.labels("taken" if taken else "refused") for taken in (True, False)
        }
        self._restarts = Counter(
            "fcn_worker_restarts",
            "Restarts of this worker, by how the one before it ended.",
            ["cause"],
            registry=registry,
        )
        for cause in (DIED, HUNG):
            self._restarts.labels(cause)
        self._workers_lost = Counter(
            "fcn_image_workers_lost",
            "Image workers that ended under their work and were replaced, by why.",
            ["reason"],
            registry=registry,
        )
        for reason in WORKERS_LOST:
            self._workers_lost.labels(reason)
        self._ready = Gauge(
            "fcn_ready", "1 if the service accepts photos, else 0.", registry=registry
        )
        self._in_flight = Gauge("fcn_in_flight", "Photos in progress.", registry=registry)
        self._in_flight_limit = Gauge(
            "fcn_in_flight_limit",
            "Photos in flight at which more are refused.",
            registry=registry,
        )
        self._deadline = Gauge(
            "fcn_deadline_seconds", "Longest time that one photo may take.", registry=registry
        )
        self._memory_limit = Gauge(
            "fcn_memory_limit_bytes",
            "Memory limit of this container, or of the machine without one.",
            registry=registry,
        )
        self._memory = [
            Gauge(name, text, registry=registry)
            for name, text in (
                (
                    "fcn_memory_bytes",
                    "Memory of this process and its image workers; what they share counts once.",
                ),
                (
                    "fcn_request_memory_bytes",
                    "Memory reserved for bodies, photos and answers.",
                ),
                (
                    "fcn_request_memory_limit_bytes",
                    "Memory that bodies, photos and answers may reserve together.",
                ),
            )
        ]
        self._queue_depth = Gauge(
            "fcn_queue_depth", "Photos waiting for the device.", ["model"], registry=registry
        )
        self._model_info = Gauge(
            "fcn_model_info",
            "1 for each loaded model.",
            ["model", "version", "precision", "provider"],
            registry=registry,
        )
        self._gpu_used = Gauge(
            "fcn_gpu_memory_used_bytes",
            "Memory of a GPU in use by all processes.",
            ["gpu"],
            registry=registry,
        )
        self._gpu_total = Gauge(
            "fcn_gpu_memory_total_bytes", "Total memory of a GPU.", ["gpu"], registry=registry
        )
        # A cache: `labels` costs more than an increment. Its size is bounded by the routes.
        self._by_request: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def request(
        self, route: str, method: str, status: int, seconds: float, reason: str | None
    ) -> None:
        """Count a request. ``route``: its path template; ``reason``: of its refusal, if any."""
        key = (route, method, status)
        found = self._by_request.get(key)
        if found is None:
            known = method if method in METHODS else OTHER
            found = (
                self._requests.labels(route, known, status),
                self._request_seconds.labels(route),
            )
            if known == method:
                self._by_request[key] = found
        found[0].inc()
        found[1].observe(seconds)
        if reason is not None:
            self.refusal(reason)

    def refusal(self, reason: str) -> None:
        """Count a problem of a request, or of one photo in it."""
        self._refusals.labels(reason).inc()

    def read(self, seconds: float) -> None:
        """Record the time from a request's head to the end of its body."""
        self._stages["read"].observe(seconds)

    def photo(self, pixels: int, file_bytes: int | None, timing_ms: Mapping[str, float]) -> None:
        """Record a segmented photo: pixels, bytes of its file if any, ms of its stages."""
        self._photo_pixels.observe(pixels)
        if file_bytes is not None:
            self._photo_bytes.observe(file_bytes)
        for stage, value in timing_ms.items():
            self._stages[stage].observe(value / 1000)

    def worker_lost(self, reason: str) -> None:
        """Count an image worker that ended under its work."""
        self._workers_lost.labels(reason).inc()

    def batch(self, size: int) -> None:
        """Record a run of the network."""
        self._batch_size.observe(size)

    def reload(self, taken: bool) -> None:
        """Count an attempt to reload a model: taken or refused."""
        self._reloads[taken].inc()

    def restarted(self, times: Mapping[str, int]) -> None:
        """Set this worker's restarts so far, by cause. Call once, at its start."""
        for cause, count in times.items():
            self._restarts.labels(cause).inc(count)

    def look_at_service(
        self,
        *,
        ready: bool,
        in_flight: int,
        limit: int,
        deadline_s: float,
        memory: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Record the service's state.

        ``memory``: bytes in use, and bytes that requests have reserved and may reserve.
        """
        for gauge, value in zip(self._memory, memory, strict=True):
            gauge.set(value)
        self._deadline.set(deadline_s)
        self._memory_limit.set(memory_limit_bytes())
        self._ready.set(ready)
        self._in_flight.set(in_flight)
        self._in_flight_limit.set(limit)

    def look_at_engines(self, engines: Iterable[EngineFacts]) -> None:
        """Record the loaded models and the state of their devices."""
        for gauge in (self._queue_depth, self._model_info, self._gpu_used, self._gpu_total):
            gauge.clear()
        for one in engines:
            self._queue_depth.labels(one.name).set(one.waiting)
            self._model_info.labels(one.name, one.version, one.precision, one.provider).set(1)
            if one.gpu is not None and one.memory is not None:
                used, total = one.memory
                self._gpu_used.labels(one.gpu).set(used)
                self._gpu_total.labels(one.gpu).set(total)

    def families(self) -> Families:
        """Collect all metrics, without the ``_created`` samples."""
        families = list(self.registry.collect())
        for family in families:
            family.samples = [
                sample for sample in family.samples if not sample.name.endswith("_created")
            ]
        return families


class Peers(Protocol):
    """The processes behind one address, this one included."""

    @property
    def label(self) -> str:
        """The label that tells them apart, for example ``worker``."""

    def answering(
        self, families: Callable[[], Awaitable[Families]]
    ) -> AbstractAsyncContextManager[None]:
        """Send this process's ``families`` to each peer that asks."""

    async def gather(self) -> Mapping[str, Families | None]:
        """The families of each process by its name; None for one that does not answer."""


def merge(label: str, groups: Mapping[str, Families | None]) -> Families:
    """Merge the families of several processes; each sample gets its process's label.

    The first family is ``fcn_<label>_up``: 1 for a process that answered, else 0.
    """
    up = Metric(f"fcn_{label}_up", "1 if the process sent its metrics, else 0.", "gauge")
    merged = {up.name: up}
    for name, families in groups.items():
        up.add_sample(up.name, {label: name}, families is not None)
        for family in families or ():
            empty = Metric(family.name, family.documentation, family.type)
            into = merged.setdefault(family.name, empty)
            for sample in family.samples:
                into.add_sample(sample.name, {label: name, **sample.labels}, sample.value)
    return list(merged.values())


def encode(families: Families, accept: str) -> tuple[bytes, str]:
    """Encode metrics for Prometheus; returns the text and its media type.

    ``accept``: the Accept header. OpenMetrics if it asks for that, else Prometheus's text format.
    """
    encoder, media_type = choose_encoder(accept)
    return encoder(_Collected(families)), media_type


@dataclass(frozen=True, slots=True)
class _Collected(Collector):
    families: Families

    def collect(self) -> Families:
        return self.families
