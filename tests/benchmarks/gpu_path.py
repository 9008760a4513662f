"""The GPU path around the network: the upsampling kernel, the copies, and complete lanes."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np

from service.artefact.contract import Precision, Shape
from service.artefact.preprocessing import Geometry
from service.inference.engine import GPU_BATCH, LANES
from service.inference.lanes import OUTPUT_BYTES, Channel, DeviceTask, Lane
from tests.benchmarks.bench import seconds_each
from tests.benchmarks.gpu_device import (
    CPU,
    GpuBench,
    Loaded,
    load,
    photo_tasks,
    shape_text,
)

SIZES: Final[tuple[Shape, ...]] = ((375, 500), (3000, 4000))
"""Height and width of most of VOC's photos, and of a 12-megapixel photo."""

_REPETITIONS: Final = 30
_LANES_S: Final = 3.0
_ROOM: Final = 64 * 2**20
"""Size in bytes of an output buffer that every measured batch fits into."""


def upsampling(bench: GpuBench) -> None:
    """Measure microseconds per photo, alone and 16 at once, with and without confidences.

    The bytes are the least that must be read and written: the logits once, and every class id.
    """
    loaded = load(bench, bench.precisions[0], graphs=False)
    rng = np.random.default_rng(0)
    for size in SIZES:
        for photos in (1,) if bench.device == CPU or size != SIZES[0] else (1, GPU_BATCH):
            for with_confidence in (False, True):
                row = {"part": "upsampling", "photo": shape_text(size), "photos": photos}
                row["confidence"] = with_confidence
                with bench.attempt(**row):
                    contract = loaded.model.contract
                    geometry = Geometry.plan(size, contract.working_size, contract.shapes)
                    image = rng.integers(0, 256, (*geometry.padded, 3), dtype=np.uint8)
                    tasks = [DeviceTask(image, geometry, with_confidence)] * photos
                    seconds = _kernel_s(bench, loaded, tasks)
                    grid = [side // contract.stride for side in geometry.padded]
                    logits_bytes = 4 * len(contract.classes) * grid[0] * grid[1]
                    ids_bytes = size[0] * size[1] * (1 + with_confidence)
                    bench.add(
                        **row,
                        us_per_photo=1e6 * seconds / photos,
                        gb_per_s=photos * (logits_bytes + ids_bytes) / seconds / 1e9,
                        gpixel_per_s=photos * size[0] * size[1] / seconds / 1e9,
                    )


def _kernel_s(bench: GpuBench, loaded: Loaded, tasks: Sequence[DeviceTask]) -> float:
    """Seconds of the kernel alone: a lane prepares its input, then only the launch is repeated."""
    lane, channel = _open_lane(loaded, output_bytes=_ROOM, max_batch=GPU_BATCH)
    lane.run(tasks)
    height, width = tasks[0].geometry.photo
    classes = len(loaded.model.contract.classes)
    repetitions = 3 if bench.device == CPU else _REPETITIONS
    return statistics.median(
        loaded.device_s(
            lambda: channel.upsample(len(tasks), height * width, classes),
            # Uploading a full batch takes 0.25 ms, long enough to queue the kernel.
            before=lambda: channel.upload(channel.input.size),
        )
        for _ in range(repetitions)
    )


def copies(bench: GpuBench) -> None:
    """Measure GB/s between page-locked host memory and the device, for a full batch."""
    loaded = load(bench, bench.precisions[0], graphs=False)
    tasks = photo_tasks(bench, loaded, 1 if bench.device == CPU else GPU_BATCH)
    lane, channel = _open_lane(loaded, max_batch=len(tasks))
    # The download waits for events that must have been recorded once.
    lane.run(tasks)
    up = sum(task.image.nbytes for task in tasks)
    down = sum(task.geometry.photo[0] * task.geometry.photo[1] for task in tasks)

    ways: tuple[tuple[str, int, Callable[[int], None], Callable[[], object]], ...] = (
        ("down", down, channel.download, channel.wait),
        ("up", up, channel.upload, loaded.wait),
    )
    for way, size, copy, wait in ways:
        with bench.attempt(part="copies", way=way):
            seconds = seconds_each(partial(copy, size), wait, bench.least_s)
            bench.add(
                part="copies",
                way=way,
                bytes=size,
                us=1e6 * statistics.median(seconds),
                gb_per_s=size / min(seconds) / 1e9,
            )


def lanes(bench: GpuBench) -> None:
    """Measure photos per second through the service's lanes, without HTTP and decoding."""
    precision = bench.precisions[0]
    batch = 2 if bench.device == CPU else GPU_BATCH
    for count in (1, LANES):
        row = {"part": "lanes", "precision": precision, "lanes": count, "batch": batch}
        with bench.attempt(**row):
            bench.add(**row, images_per_s=_lanes_rate(bench, precision, count, batch))
        gc.collect()


def _lanes_rate(bench: GpuBench, precision: Precision, count: int, batch: int) -> float:
    on_cpu = bench.device == CPU
    loaded = load(bench, precision, graphs=not on_cpu)
    lock = threading.Lock()
    opened = [
        _open_lane(loaded, number=number, max_batch=batch, graphs=not on_cpu, lock=lock)[0]
        for number in range(count)
    ]
    tasks = photo_tasks(bench, loaded, batch)
    # One fixed thread per lane, because ONNX Runtime stores captured graphs per thread.
    threads = [ThreadPoolExecutor(1) for _ in opened]
    for thread, lane in zip(threads, opened, strict=True):
        thread.submit(lane.warm_up).result()
    started = time.perf_counter()
    end = started + (1.0 if bench.quick else _LANES_S)
    done = [
        thread.submit(_until, lane, tasks, end)
        for thread, lane in zip(threads, opened, strict=True)
    ]
    batches = sum(one.result() for one in done)
    elapsed = time.perf_counter() - started
    for thread in threads:
        thread.shutdown()
    return batches * batch / elapsed


def _until(lane: Lane, tasks: Sequence[DeviceTask], end: float) -> int:
    batches = 0
    while time.perf_counter() < end:
        lane.run(tasks)
        batches += 1
    return batches


def _open_lane(
    loaded: Loaded,
    *,
    max_batch: int,
    number: int = 0,
    graphs: bool = False,
    output_bytes: int = OUTPUT_BYTES,
    lock: threading.Lock | None = None,
) -> tuple[Lane, Channel]:
    """A lane as the service opens it, for sizes up to the contract's largest; and its channel."""
    channels: list[Channel] = []

    def open_channel(*sizes: int) -> Channel:
        channels.append(loaded.gpu.open_channel(*sizes))
        return channels[-1]

    lane = Lane(
        number,
        open_channel,
        loaded.model,
        loaded.model.contract,
        max_batch=max_batch,
        max_side=max(max(shape) for shape in loaded.model.contract.shapes),
        graphs=graphs,
        lock=lock or threading.Lock(),
        output_bytes=output_bytes,
    )
    return lane, channels[0]
