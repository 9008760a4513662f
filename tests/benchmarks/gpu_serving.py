"""The service on a GPU over HTTP: throughput by clients and processes, and single photos."""

from __future__ import annotations

import sys
from typing import Final

from service.system import available_cores
from tests.benchmarks.gpu_device import CPU, GpuBench, Utilisation
from tests.benchmarks.photos import large_photo
from tests.benchmarks.servers import Running, Side, running

CLIENTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEWER_CLIENTS: Final = (16, 64, 256)
PROCESSES: Final = (1, 2, 4)

SATURATED: Final = 0.9
"""Above this share of its core, a load generator may limit the throughput."""

_REQUESTS: Final = 300
_LARGE_REQUESTS: Final = 40


def serving(bench: GpuBench) -> None:
    """Measure each number of processes after a new start; single photos with one process."""
    on_cpu = bench.device == CPU
    for processes in (1,) if on_cpu or bench.quick else PROCESSES:
        row = {"part": "serving", "processes": processes}
        with (
            bench.attempt(**row),
            running(_side(bench, processes), bench.photos[0], bench.logs) as server,
        ):
            bench.add(**row, load="start", start_s=server.start_s)
            if processes == 1:
                _alone(bench, server)
            if on_cpu:
                clients: tuple[int, ...] = (1, 2)
            elif bench.quick:
                clients = FEWER_CLIENTS
            else:
                clients = CLIENTS if processes == 1 else FEWER_CLIENTS
            for count in clients:
                with bench.attempt(**row, load="closed", clients=count):
                    _window(bench, server, processes, count)


def _side(bench: GpuBench, processes: int) -> Side:
    """``fcn-segment serve`` in this environment, with its default settings."""
    command = (
        *(sys.executable, "-m", "service", "serve", "--port", "{port}"),
        *("--model", str(bench.artefact), "--device", bench.device),
        *("--processes", str(processes), "--log-level", "warning"),
        *(("--precision", "fp32") if bench.device == CPU else ()),
    )
    return Side(f"ours in {processes}", command, ready="/readyz")


def _window(bench: GpuBench, server: Running, processes: int, clients: int) -> None:
    """Measure a closed loop. The generators use at most a quarter of the service's cores."""
    generators = min(clients, max(1, min(8, available_cores() // 4)))
    seconds = 2.5 if bench.quick else 3.0
    with Utilisation(bench.device) as gpu:
        window = server.closed(bench.photos, clients, seconds, generators=generators)
    bench.add(
        part="serving",
        load="closed",
        processes=processes,
        clients=clients,
        generators=generators,
        generator_saturated=window.client_cpu > SATURATED,
        gpu_busy=gpu.share(window.started_s, window.ended_s),
        gpu_busy_missing=gpu.missing,
        **window.summary(),
    )


def _alone(bench: GpuBench, server: Running) -> None:
    """Measure one photo after another: 500x375, and 12 megapixels."""
    large = large_photo(bench.out / "photos", bench.photos[0])
    few = bench.device == CPU or bench.quick
    for name, photos, requests in (
        ("500x375", bench.photos, 60 if few else _REQUESTS),
        ("4000x3000", [large], 10 if few else _LARGE_REQUESTS),
    ):
        for _ in range(5):
            server.answer(photos[0])
        window = server.closed(photos, 1, 60.0, warm_up_s=0.0, requests=requests)
        bench.add(part="serving", load="alone", photo=name, **window.summary())
