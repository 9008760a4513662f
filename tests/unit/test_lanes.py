"""Lanes on a simulated device, with the GPU's own kernel compiled for the host."""

import asyncio
import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.artefact.contract import Shape
from service.artefact.preprocessing import Geometry
from service.errors import DeviceMemoryExhausted, Overloaded
from service.inference.batcher import Batcher
from service.inference.lanes import (
    NO_GRAPH,
    PIECE,
    WARM_UP_RUNS,
    DeviceTask,
    Lane,
    batch_sizes,
    plan_rounds,
)
from service.inference.upsampling import upsample
from tests.artefacts import STRIDE, make_contract
from tests.host_device import HostDevice, host_kernel

SHAPE = (64, 96)


class ScriptedNetwork:
    """Writes logits that depend on the image's first byte to the given address.

    ``runs`` are the batch size, shape and graph of each; ``error`` is raised instead, once.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, Shape, int]] = []
        self.error: Exception | None = None

    def bind(
        self, input_address: int, logits_address: int, batch_size: int, shape: Shape, graph: int
    ) -> Callable[[], None]:
        """As `Model.bind`, in the host's memory."""
        height, width = shape
        images = _view(input_address, (batch_size, height, width, 3), np.uint8)
        grid = (batch_size, 21, height // STRIDE, width // STRIDE)
        logits = _view(logits_address, grid, np.float32)

        def run() -> None:
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            self.runs.append((batch_size, shape, graph))
            for image, out in zip(images, logits, strict=True):
                out[:] = logits_of(int(image[0, 0, 0]), grid[1:])

        return run


def _view(address: int, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    view: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
    return view


def logits_of(seed: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Smooth enough to have areas, rough enough to have borders in every cell."""
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def make_lane(
    device: HostDevice,
    network: ScriptedNetwork,
    *,
    number: int = 0,
    max_side: int = 96,
    graphs: bool = True,
    output_bytes: int = 1 << 22,
) -> Lane:
    """A lane over `make_contract`'s shapes."""
    return Lane(
        number,
        device.open_channel,
        network,
        make_contract(),
        max_batch=4,
        max_side=max_side,
        graphs=graphs,
        lock=threading.Lock(),
        output_bytes=output_bytes,
    )


def make_task(seed: int, photo: Shape, *, with_confidence: bool = False) -> DeviceTask:
    """A photo of any size, whose valid region is not the whole input."""
    image = np.full((*SHAPE, 3), seed, dtype=np.uint8)
    return DeviceTask(image, Geometry(photo, (50, 90), SHAPE), with_confidence)


def check(tasks: Sequence[DeviceTask], lane: Lane) -> None:
    """Compare every photo's labels with the CPU's upsampling, except for near ties."""
    for task, result in zip(tasks, lane.run(tasks), strict=True):
        logits = logits_of(int(task.image[0, 0, 0]), (21, SHAPE[0] // STRIDE, SHAPE[1] // STRIDE))
        wanted = upsample(logits, task.geometry, with_confidence=task.with_confidence)
        same = result.labels.mask == wanted.mask
        assert same.mean() >= 0.9999
        if wanted.confidence is None:
            assert result.labels.confidence is None
        else:
            assert result.labels.confidence is not None
            off = result.labels.confidence.astype(int) - wanted.confidence
            assert np.abs(off[same]).max() <= 1


def test_the_kernel_and_the_host_agree_on_a_pieces_layout() -> None:
    """Every field's offset, and the total size."""
    offsets = [PIECE.fields[name][1] for name in PIECE.names or ()] if PIECE.fields else []
    layout = [host_kernel().piece_layout(field) for field in range(len(offsets) + 1)]
    assert layout == [*offsets, PIECE.itemsize]


@pytest.mark.parametrize("classes", [1, 150, 255])
def test_the_kernel_upsamples_any_number_of_classes(classes: int) -> None:
    """The ids and confidences of the CPU's upsampling, up to the last class."""
    photo, grid = (75, 110), (4, 6)
    pixels = photo[0] * photo[1]
    channel = HostDevice().open_channel(PIECE.itemsize, classes * 24 * 4, 2 * pixels)
    logits = logits_of(classes, (classes, *grid))
    logits[-1, 1:3, 2:4] += 20
    channel.logits[:] = logits.ravel()
    record = np.zeros(1, dtype=PIECE)
    record["confidence"] = record["pixels"] = pixels
    record["row_step"], record["column_step"] = grid[0] / photo[0], grid[1] / photo[1]
    record["width"] = photo[1]
    record["grid_height"], record["grid_width"] = grid
    channel.device_input[:] = record.view(np.uint8)
    channel.upsample(1, pixels, classes)
    mask, confidence = channel.device_output.reshape(2, *photo)
    wanted = upsample(logits, Geometry(photo, SHAPE, SHAPE), with_confidence=True)
    assert mask.max() == classes - 1
    same = mask == wanted.mask
    assert same.mean() >= 0.9999
    assert wanted.confidence is not None
    assert np.abs(confidence.astype(int) - wanted.confidence)[same].max() <= 1


def test_a_batch_of_different_sizes_comes_down_as_the_cpu_would_make_it() -> None:
    """Larger and smaller than the input, one pixel high, with and without confidences."""
    lane = make_lane(HostDevice(), ScriptedNetwork())
    check(
        [
            make_task(1, (375, 500)),
            make_task(2, (1, 333), with_confidence=True),
            make_task(3, (20, 7)),
            make_task(4, (480, 640), with_confidence=True),
        ],
        lane,
    )


@settings(max_examples=60, deadline=None)
@given(
    photos=st.lists(
        st.tuples(st.integers(1, 90), st.integers(1, 90), st.booleans()), min_size=1, max_size=4
    ),
    output_bytes=st.sampled_from([2, 3, 64, 1000, 4096, 1 << 20]),
)
def test_rounds_cover_every_pixel_once(
    photos: list[tuple[int, int, bool]], output_bytes: int
) -> None:
    """For all sizes and buffers; no round exceeds the buffer."""
    tasks = [
        make_task(nth, (height, width), with_confidence=confidence)
        for nth, (height, width, confidence) in enumerate(photos)
    ]
    covered = [np.zeros(height * width, dtype=int) for height, width, _ in photos]
    for pieces in plan_rounds(tasks, output_bytes):
        assert len({piece.photo for piece in pieces}) == len(pieces) <= len(tasks)
        end = 0
        for piece in pieces:
            assert piece.offset == end
            end += piece.pixels * (1 + tasks[piece.photo].with_confidence)
            covered[piece.photo][piece.first : piece.first + piece.pixels] += 1
        assert 0 < end <= output_bytes
    assert all((photo == 1).all() for photo in covered)


def test_a_photo_larger_than_the_buffer_comes_down_in_rounds() -> None:
    """Same mask, memory independent of the photo's size; the network runs once."""
    device, network = HostDevice(), ScriptedNetwork()
    lane = make_lane(device, network, output_bytes=100_000)
    check([make_task(1, (700, 1001), with_confidence=True), make_task(2, (300, 200))], lane)
    assert len(network.runs) == 1
    downloads = [size for command, size in device.channels[0].commands if command == "download"]
    assert len(downloads) == -(-(700 * 1001 * 2 + 300 * 200) // 100_000)
    assert max(downloads) <= 100_000


def test_nothing_but_uint8_crosses_the_bus() -> None:
    """Images and a record each are uploaded; only the photos' class ids are downloaded."""
    device = HostDevice()
    lane = make_lane(device, ScriptedNetwork())
    lane.run([make_task(1, (375, 500)), make_task(2, (20, 30))])
    (_, up), _, (_, down) = device.channels[0].commands
    assert up <= 2 * SHAPE[0] * SHAPE[1] * 3 + 1024
    assert down == 375 * 500 + 20 * 30


def test_a_batch_that_is_too_large_for_the_input_runs_in_parts() -> None:
    """Photos of an unlisted shape, four times the largest listed one."""
    network = ScriptedNetwork()
    lane = make_lane(HostDevice(), network, max_side=192)
    shape = (192, 192)
    image = np.zeros((*shape, 3), dtype=np.uint8)
    tasks = [DeviceTask(image, Geometry((50, 60), shape, shape), with_confidence=False)] * 4
    assert len(lane.run(tasks)) == 4
    assert [(size, graph) for size, _, graph in network.runs] == [(1, NO_GRAPH)] * 4


def test_the_warm_up_runs_every_listed_shape_and_size_often_enough_to_capture_it() -> None:
    """Each has its own graph per lane; later runs use the same graphs."""
    network, device = ScriptedNetwork(), HostDevice()
    lanes = [make_lane(device, network, number=number) for number in range(2)]
    for lane in lanes:
        lane.warm_up()
    shapes = make_contract().shapes
    graphs = {graph for _, _, graph in network.runs}
    assert (
        len(graphs) == 2 * len(shapes) * len(batch_sizes(4)) == sum(lane.captured for lane in lanes)
    )
    assert NO_GRAPH not in graphs
    assert len(network.runs) == len(graphs) * WARM_UP_RUNS
    network.runs.clear()
    lanes[1].run([make_task(1, (30, 40))] * 3)
    ((size, shape, graph),) = network.runs
    assert (size, shape) == (3, SHAPE)
    assert graph in graphs


def test_without_graphs_nothing_is_captured() -> None:
    """`graphs=False` disables capturing."""
    network = ScriptedNetwork()
    lane = make_lane(HostDevice(), network, graphs=False)
    lane.warm_up()
    assert lane.captured == 0
    assert {graph for _, _, graph in network.runs} == {NO_GRAPH}


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (4, (1, 2, 3, 4)), (16, (1, 2, 3, 4, 6, 8, 12, 16)), (5, (1, 2, 3, 4, 5))],
)
def test_batch_sizes_waste_a_third_at_most(most: int, sizes: tuple[int, ...]) -> None:
    """Each size in between is padded to the next."""
    assert batch_sizes(most) == sizes
    for wanted in range(1, most + 1):
        run = next(size for size in sizes if size >= wanted)
        assert (run - wanted) / run <= 1 / 3


def test_short_memory_fails_one_batch_and_shrinks_the_next() -> None:
    """503 with a time to retry; the lane, the batcher and the process continue."""
    network = ScriptedNetwork()
    lane = make_lane(HostDevice(), network)
    tasks = [make_task(nth, (30, 40)) for nth in range(4)]

    async def load() -> None:
        batcher = Batcher[DeviceTask, Any](None, shares=[lane.run], max_batch=4)
        network.error = DeviceMemoryExhausted("Failed to allocate memory")
        answers = await asyncio.gather(
            *(batcher.submit(task, key=SHAPE) for task in tasks), return_exceptions=True
        )
        assert all(isinstance(answer, Overloaded) for answer in answers)
        assert all(
            answer.retry_after_s >= 1 for answer in answers if isinstance(answer, Overloaded)
        )
        await asyncio.gather(*(batcher.submit(task, key=SHAPE) for task in tasks))
        assert [size for size, _, _ in network.runs] == [2, 2]
        await batcher.close()

    asyncio.run(load())
