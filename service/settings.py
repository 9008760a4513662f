"""The service's settings: ``FCN_*`` in the environment, the same names as flags of ``serve``."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.access import parse_rate_limits
from service.artefact.contract import one_line
from service.errors import SettingsError
from service.system import memory_limit_bytes

ENV_PREFIX: Final = "FCN_"
API_KEY_VARIABLE: Final = "FCN_API_KEY"
"""The key that clients send; no setting of a service, which knows keys by their hashes alone."""
REMOVED: Final = {"min_side": "; it was removed in 0.2.0: the least max_side is 64"}
"""Settings of earlier releases, and what an error says about them."""

# What Kubernetes sets in each pod for a Service whose name begins with "fcn", unless the pod has
# enableServiceLinks: false. Source: https://kubernetes.io/docs/concepts/services-networking/service.
_SERVICE_LINK: Final = re.compile(
    r"FCN_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_LINKED_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://")

DEFAULT_MODEL: Final = (
    Path(__file__).parent.parent / "models" / "artifacts" / "context_fcn_resnet50_8s"
)


class Settings(BaseSettings):
    """Every knob of the service; read it with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    model: Path = Field(DEFAULT_MODEL, description="artefact folder to serve")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    models_memory_mb: int = Field(
        2048,
        ge=0,
        description="memory for the models in the folders beside the default one, loaded on "
        "demand, MiB; 0 serves the default alone",
    )
    device: str = Field(
        "auto",
        description="device of the network: auto, cpu, cuda or cuda:N (GPU number N); cuda without "
        "that GPU stops the start",
    )
    gpus: str | None = Field(
        None,
        description="numbers of the GPUs to serve on, such as 0,1; each gets its own process",
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="serving processes per device behind the one port; each has its own queue, "
        "threads and /readyz",
    )
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        "auto", description="network to run: auto (the fastest on the device), fp32, fp16 or int8"
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="CPU threads of one inference (default: all usable cores, shared evenly "
        "between the processes)",
    )
    provider: Literal["cuda", "tensorrt"] = Field(
        "cuda",
        description="ONNX Runtime provider on a GPU: cuda or tensorrt, which needs its own "
        "packages",
    )
    cuda_graphs: bool = Field(
        True, description="replay the listed shapes as CUDA graphs, captured at the start"
    )
    gpu_memory_mb: int = Field(
        0, ge=0, description="most GPU memory for the network's activations, MiB; 0: no limit"
    )
    cache_dir: Path | None = Field(
        None, description="folder for TensorRT engines (default: none, each start builds them)"
    )
    decode_workers: int | None = Field(
        None,
        ge=1,
        le=256,
        description="processes that decode and encode photos (default: 3 on a CPU, one per usable "
        "core with a GPU)",
    )
    max_bytes: int = Field(20 * 2**20, ge=1024, description="largest image file, bytes")
    max_images: int = Field(
        16, ge=1, le=1000, description="most images in one request to /segment/batch"
    )
    max_images_bytes: int = Field(
        64 * 2**20,
        ge=1024,
        description="largest total of the images in one request to /segment/batch, bytes",
    )
    memory_mb: int | None = Field(
        None,
        ge=256,
        description="memory that the service may take with its image workers, requests and "
        "answers, but without models loaded on demand, MiB; several processes share it evenly "
        "(default: four fifths of the container's or machine's)",
    )
    photo_cpu_s: float = Field(
        4.0,
        gt=0,
        le=600,
        description="CPU time that decoding and encoding of one photo may take, seconds",
    )
    # Above this Pillow itself refuses to open an image.
    max_pixels: int = Field(
        64_000_000, ge=1024, le=178_956_970, description="largest image, pixels"
    )
    max_side: int = Field(
        1280, ge=64, le=4096, description="greatest max_side of a request, pixels"
    )
    queue_size: int | None = Field(
        None,
        ge=1,
        description="photos in progress at once; more are refused (default: 64 on a CPU, 256 on "
        "a GPU)",
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="most photos in one run of the network (default: 1 on a CPU, 16 on a GPU)",
    )
    max_wait_ms: float = Field(
        10.0, ge=0, description="longest time that fuller batches may overtake a photo, ms"
    )
    deadline_s: float = Field(30.0, gt=0, description="time limit for one photo, seconds")
    client_timeout_s: float = Field(
        20.0,
        gt=0,
        description="time limit for a client to send the head of a request, and to send its body "
        "and read the answer 64 KiB, or a sixteenth if that is more, at a time, seconds",
    )
    max_connections: int = Field(
        1000,
        ge=1,
        description="most connections to each process; one address may have a quarter of them, a "
        "trusted proxy all",
    )
    watchdog_s: float | None = Field(
        None,
        ge=1,
        description="time after which a batch or the event loop counts as hanging and the process "
        "ends, seconds (default: twice the deadline, at least 60)",
    )
    api_keys_file: Path | None = Field(
        None,
        description="file of API key hashes, made by fcn-segment key; read again when it changes "
        "(default: no key needed)",
    )
    rate_limit: str | None = Field(
        None,
        description="requests per key, or per address without keys, to each process, such as "
        "60/minute or 5/second;1000/day (default: no limit)",
    )
    trusted_proxies: str = Field(
        "127.0.0.1",
        description="addresses and networks of proxies whose X-Forwarded-For is trusted, "
        "comma-separated, such as 10.0.0.0/8",
    )
    allowed_hosts: str | None = Field(
        None,
        description="host names that requests may be addressed to, comma-separated, such as "
        "segment.example or *.example; * for all (default: the loopback names if the service "
        "listens on a loopback address, all otherwise)",
    )
    cors_origins: str | None = Field(
        None,
        description="origins whose web pages may call the service, comma-separated, such as "
        "https://one.example; * for all (default: none)",
    )
    label_studio_url: str | None = Field(
        None,
        description="the only Label Studio that task images are fetched from, http://host:port "
        "(default: none, tasks carry images as data: URIs)",
    )
    label_studio_token: SecretStr | None = Field(
        None,
        description="token for that Label Studio: personal access token or legacy token",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level that is logged: debug, info, warning or error"
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="format of log lines: console or json"
    )

    @field_validator("port", mode="before")
    @classmethod
    def _no_service_link(cls, port: object) -> object:
        """The default for what Kubernetes sets where a Service is named ``fcn``."""
        linked = isinstance(port, str) and _LINKED_ADDRESS.match(port)
        return cls.model_fields["port"].default if linked else port

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", device):
            raise ValueError(f"should be auto, cpu, cuda or cuda:N, got {device!r}")
        return device

    @field_validator("gpus")
    @classmethod
    def _distinct_numbers(cls, gpus: str | None) -> str | None:
        if gpus is not None:
            numbers = gpus.split(",")
            if not all(re.fullmatch("[0-9]{1,4}", number) for number in numbers):
                raise ValueError(f"should be numbers such as 0,1, got {gpus!r}")
            if len(set(map(int, numbers))) < len(numbers):
                raise ValueError(f"names a GPU twice: {gpus!r}")
        return gpus

    @field_validator("rate_limit")
    @classmethod
    def _limits(cls, limits: str | None) -> str | None:
        if limits is not None:
            parse_rate_limits(limits)
        return limits

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, proxies: str) -> str:
        for proxy in proxies.split(","):
            ipaddress.ip_network(proxy.strip())
        return proxies

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, hosts: str | None) -> str | None:
        for host in (hosts or "*").split(","):
            if not re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[?[0-9a-fA-F:.]+\]?", host.strip()):
                raise ValueError(f"should be names such as segment.example, got {host!r}")
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: str | None) -> str | None:
        for origin in [] if origins in (None, "*") else (origins or "").split(","):
            if not re.fullmatch(r"https?://[^/?#@*,\s]+", origin):
                raise ValueError(f"should be origins such as https://one.example, got {origin!r}")
        return origins

    @field_validator("label_studio_url")
    @classmethod
    def _plain_origin(cls, url: str | None) -> str | None:
        if url is not None:
            parts = urlsplit(url)
            unwanted = parts.query or parts.fragment or "@" in parts.netloc
            if parts.scheme not in ("http", "https") or not parts.hostname or unwanted:
                raise ValueError("should be like http://host:port, without user, query or fragment")
            _ = parts.port  # raises ValueError for what is no number
        return url

    @property
    def gpu_numbers(self) -> tuple[int, ...]:
        """The numbers in ``gpus``; none where it is unset."""
        return tuple(map(int, self.gpus.split(","))) if self.gpus is not None else ()

    @property
    def hung_after_s(self) -> float:
        """When what runs is taken to hang, seconds."""
        return self.watchdog_s or max(60.0, 2 * self.deadline_s)

    @property
    def host_names(self) -> tuple[str, ...]:
        """The names in ``allowed_hosts``; none where it is unset."""
        hosts = self.allowed_hosts
        return tuple(map(str.strip, hosts.split(","))) if hosts is not None else ()

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """The origins in ``cors_origins``; none where it is unset."""
        return tuple(self.cors_origins.split(",")) if self.cors_origins is not None else ()


def load_settings(
    overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings from the environment; ``overrides`` (the flags) win.

    Raises `SettingsError` with one line that names the first variable that is unknown or wrong.
    """
    overrides = overrides or {}
    for variable, value in (os.environ if environ is None else environ).items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable == API_KEY_VARIABLE or _is_service_link(variable, value):
            continue
        if variable.startswith(ENV_PREFIX) and name not in Settings.model_fields:
            close = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"; did you mean {ENV_PREFIX}{close[0].upper()}?" if close else ""
            hint = REMOVED.get(name, hint)
            raise SettingsError(f"unknown setting {variable}{hint}")
    try:
        settings = Settings(**overrides)
    except ValidationError as exc:
        field = str(exc.errors()[0]["loc"][0])
        source = f"--{field.replace('_', '-')}" if field in overrides else env_name(field)
        raise SettingsError(f"{source}: {one_line(exc).removeprefix(field + ': ')}") from exc
    if settings.gpus is not None and settings.device not in ("auto", "cuda"):
        raise SettingsError(
            f"{env_name('gpus')} ({settings.gpus}) cannot be combined with "
            f"{env_name('device')} ({settings.device})"
        )
    return settings


def _is_service_link(variable: str, value: str) -> bool:
    """Whether a variable is one that Kubernetes sets for a Service, and no setting."""
    if variable.endswith("_PORT") and _LINKED_ADDRESS.match(value):
        return True
    return _SERVICE_LINK.fullmatch(variable) is not None


def default_memory_mb() -> int:
    """The default of ``memory_mb``: four fifths of the container's or machine's memory."""
    return memory_limit_bytes() * 4 // 5 >> 20


def env_name(field: str) -> str:
    """The environment variable of a field."""
    return ENV_PREFIX + field.upper()


def given_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The flags of settings that were given on a command line, by the settings' names."""
    given = vars(parsed)
    return {name: given[name] for name in Settings.model_fields if given.get(name) is not None}
