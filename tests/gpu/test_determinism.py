"""The same photo always gets the same mask, whatever else the GPU does."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from service.inference.lanes import DeviceTask, Lane
from tests.gpu.conftest import MAX_BATCH, Gpu, Photo, differing, masks

Mask = npt.NDArray[np.uint8]

REPETITIONS = 10

OTHER_KERNELS = 0.002
"""cuDNN may choose another kernel for another batch size, which rounds near ties differently."""


def test_alone_ten_times(
    fp16_lane: Lane, photos: list[Photo], prepare: Callable[..., DeviceTask]
) -> None:
    """The masks are equal byte for byte, with other photos in between."""
    task, other = prepare(photos[0], (375, 500)), prepare(photos[1], (375, 500))
    (wanted,) = masks(fp16_lane, [task])
    for _ in range(REPETITIONS):
        masks(fp16_lane, [other])
        assert np.array_equal(masks(fp16_lane, [task])[0], wanted)


@pytest.mark.parametrize("size", range(2, MAX_BATCH + 1))
def test_in_a_batch_ten_times(
    size: int, fp16_lane: Lane, photos: list[Photo], prepare: Callable[..., DeviceTask]
) -> None:
    """Masks in a batch are always equal, and equal to those of single photos except near ties."""
    tasks = [prepare(photos[nth % len(photos)], (375, 500)) for nth in range(size)]
    rng = np.random.default_rng(size)
    noise = [prepare(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)) for _ in range(MAX_BATCH)]
    wanted = masks(fp16_lane, tasks)
    for _ in range(REPETITIONS):
        # The unused places of a batch hold the previous photos.
        masks(fp16_lane, noise)
        for found, one in zip(masks(fp16_lane, tasks), wanted, strict=True):
            assert np.array_equal(found, one)
    for task, one in zip(tasks, wanted, strict=True):
        assert differing(masks(fp16_lane, [task])[0], one) <= OTHER_KERNELS


def test_two_lanes_at_once_do_not_disturb_each_other(
    fp16: Gpu, photos: list[Photo], prepare: Callable[..., DeviceTask]
) -> None:
    """The masks stay the same while one lane copies and the other one computes."""
    batches = [
        [prepare(photos[(nth + start) % len(photos)], (375, 500)) for nth in range(size)]
        for start, size in enumerate((1, 4, 3, 8, 2))
    ]
    batches.append([prepare(photos[3], (900, 700), with_confidence=True)])
    batches.append([prepare(photos[1], (333, 444), max_side=320)] * 2)
    together = threading.Barrier(2)

    def work(lane: Lane, start: int) -> list[list[Mask]]:
        # Warm up in this thread: ONNX Runtime stores captured graphs per thread.
        lane.warm_up()
        alone = [masks(lane, batch) for batch in batches] if start == 0 else []
        together.wait(timeout=120)
        order = [*range(start, len(batches)), *range(start)]
        for _ in range(REPETITIONS):
            found = {nth: masks(lane, batches[nth]) for nth in order}
        return [*alone, *(found[nth] for nth in range(len(batches)))]

    lanes = [fp16.open_lane(), fp16.open_lane()]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, lanes, (0, 3))
    alone, at_once = first[: len(batches)], first[len(batches) :]
    for wanted, *others in zip(alone, at_once, second, strict=True):
        for found in others:
            for one, other in zip(wanted, found, strict=True):
                assert np.array_equal(one, other)
