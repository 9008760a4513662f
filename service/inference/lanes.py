"""Batches on a GPU: uint8 photos go up, uint8 class ids at each photo's own size come down.

A *lane* owns the buffers of one batch: page-locked ones on the host, others on the device, and a
stream for the copies between them. Several lanes share one network and one compute stream: while
one lane's batch computes, another's is packed and uploaded, or downloaded and unpacked. All buffers
are allocated at the start and never grow:

* A batch that does not fit into the input buffer runs in parts.
* Class ids that do not fit into the output buffer are downloaded in rounds. A *piece* is the part
  of one photo in one round.

While the lane warms up, the listed shapes in the listed batch sizes are captured as CUDA graphs;
later runs replay them. This module knows neither CUDA nor ONNX Runtime: it gets a `Channel`, which
``service.inference.cuda`` opens (on the CPU in the tests), and a `Network`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from service.artefact.contract import ModelContract, Shape
from service.artefact.preprocessing import Geometry, round_up
from service.inference.upsampling import Labels

OUTPUT_BYTES: Final = 16 * 2**20
"""Output buffer of a lane: enough for a batch of usual photos, or for one of 16 megapixels."""

WARM_UP_RUNS: Final = 3
"""ONNX Runtime captures a graph in the second run of a batch size and shape, and replays it
in later runs."""

NO_GRAPH: Final = -1
"""The graph id of a run that is neither captured nor replayed. Source: ONNX Runtime, CUDA
execution provider, ``gpu_graph_id``."""

NO_CONFIDENCE: Final = 2**64 - 1

PIECE: Final = np.dtype(
    [
        ("logits", np.uint64),
        ("ids", np.uint64),
        ("confidence", np.uint64),
        ("row_step", np.float64),
        ("column_step", np.float64),
        ("first", np.uint32),
        ("pixels", np.uint32),
        ("width", np.uint32),
        ("grid_height", np.int32),
        ("grid_width", np.int32),
    ],
    align=True,
)
"""A piece as the kernel reads it: ``Piece`` in ``upsampling.cu``, field by field."""

_ALIGNMENT: Final = 256
"""Alignment of CUDA's own allocations, in bytes."""


@dataclass(frozen=True, slots=True)
class DeviceTask:
    """A photo for the device. ``image``: ``(h, w, 3) uint8`` RGB of size ``geometry.padded``."""

    image: npt.NDArray[np.uint8]
    geometry: Geometry
    with_confidence: bool


@dataclass(frozen=True, slots=True)
class Upsampled:
    """A lane's result for a photo, and the device's seconds for the whole batch.

    ``infer_s``: the network; ``upsample_s``: the upsampling and the download.
    """

    labels: Labels
    infer_s: float
    upsample_s: float


class Channel(Protocol):
    """A lane's buffers on a device, and its commands, which are queued and return at once.

    ``input`` and ``output`` are page-locked ``(bytes,) uint8`` arrays in the host's memory; the
    device has a buffer of the same size for each. Raises `DeviceMemoryExhausted` if memory runs
    out, or the errors of the device's library.
    """

    @property
    def input(self) -> npt.NDArray[np.uint8]:
        """The host's buffer that `upload` copies."""

    @property
    def output(self) -> npt.NDArray[np.uint8]:
        """The host's buffer that `download` fills."""

    @property
    def input_address(self) -> int:
        """Address of the device's input."""

    @property
    def logits_address(self) -> int:
        """Address of the device's ``float32`` logits."""

    def upload(self, size: int) -> None:
        """Copy the first ``size`` bytes of ``input`` to the device; later commands wait for it."""

    def upsample(self, pieces: int, most_pixels: int, classes: int) -> None:
        """Upsample the `PIECE` records at the start of the input into the device's output."""

    def download(self, size: int) -> None:
        """Copy the first ``size`` bytes of the device's output to ``output``."""

    def wait(self) -> tuple[float, float]:
        """Wait for the last download.

        Returns the device's seconds from the upload's end to `upsample`, and from there to the end.
        """


class Network(Protocol):
    """A network that reads and writes the caller's buffers."""

    def bind(
        self, input_address: int, logits_address: int, batch_size: int, shape: Shape, graph: int
    ) -> Callable[[], None]:
        """Return a function that queues one run on the device's compute stream.

        ``graph``: a number of the CUDA graph to capture and replay, or `NO_GRAPH`.
        """


@dataclass(frozen=True, slots=True)
class Piece:
    """Photo number ``photo``'s ``pixels`` pixels from ``first`` on, written to ``offset``."""

    photo: int
    first: int
    pixels: int
    offset: int


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the batch sizes to run: powers of two, the sizes halfway between them, and ``most``.

    A batch of another size is padded to the next one; at most a third is padding.
    """
    sizes = {most}
    for power in range(most.bit_length()):
        sizes.update((2**power, 3 * 2**power))
    return tuple(sorted(size for size in sizes if size <= most))


def plan_rounds(tasks: Sequence[DeviceTask], capacity: int) -> Iterator[list[Piece]]:
    """Lay the photos' class ids, each followed by its confidences, into rounds of ``capacity``.

    ``capacity``: bytes, 2 or more. Every round has at most one piece of each photo.
    """
    pieces: list[Piece] = []
    used = 0
    for photo, task in enumerate(tasks):
        height, width = task.geometry.photo
        planes = 1 + task.with_confidence
        first = 0
        while first < height * width:
            pixels = min(height * width - first, (capacity - used) // planes)
            if pixels:
                pieces.append(Piece(photo, first, pixels, used))
                first += pixels
                used += pixels * planes
            if first < height * width:
                yield pieces
                pieces, used = [], 0
    yield pieces


class Lane:
    """Runs one batch at a time on the device; call `run` from one thread only.

    ``graphs``: whether listed shapes are captured; ``number``: the lane's number on its device. The
    lanes of a device share ``lock``: their commands on the compute stream must not interleave,
    because all runs of a network use the same memory.
    """

    def __init__(
        self,
        number: int,
        open_channel: Callable[[int, int, int], Channel],
        network: Network,
        contract: ModelContract,
        *,
        max_batch: int,
        max_side: int,
        graphs: bool,
        lock: threading.Lock,
        output_bytes: int = OUTPUT_BYTES,
    ) -> None:
        self._network = network
        self._contract = contract
        self._sizes = batch_sizes(max_batch)
        self._graphs = graphs
        self._lock = lock
        # Room for a full batch of any listed shape, and for one photo of the largest size.
        largest = max(height * width for height, width in contract.shapes)
        self._pixels = max(max_batch * largest, round_up(max_side) ** 2)
        self._images_at = _aligned(max_batch * PIECE.itemsize)
        classes = len(contract.classes)
        self._channel = open_channel(
            self._images_at + self._pixels * 3,
            self._pixels // contract.stride**2 * classes * np.dtype(np.float32).itemsize,
            output_bytes,
        )
        listed = list(product(contract.shapes, self._sizes))
        # Graphs are per lane: a graph reads and writes the addresses that it was captured with.
        first = 1 + number * len(listed)
        self._listed = {
            (shape, size): self._bind(shape, size, first + nth if graphs else NO_GRAPH)
            for nth, (shape, size) in enumerate(listed)
            if self._fits(shape, size)
        }

    @property
    def captured(self) -> int:
        """Number of graphs that the warm-up captures."""
        return len(self._listed) if self._graphs else 0

    def warm_up(self) -> None:
        """Run every listed shape in every batch size, so that no request has to wait for it.

        Call it in the thread that calls `run` later: ONNX Runtime keeps captured graphs per thread.
        """
        for shape, size in self._listed:
            image = np.zeros((*shape, 3), dtype=np.uint8)
            task = DeviceTask(image, Geometry(shape, shape, shape), with_confidence=False)
            for _ in range(WARM_UP_RUNS if self._graphs else 1):
                self.run([task] * size)

    def run(self, tasks: Sequence[DeviceTask]) -> list[Upsampled]:
        """Run photos of one shape on the device, blocking; returns a result for each."""
        shape = tasks[0].geometry.padded
        most = max(size for size in self._sizes if self._fits(shape, size))
        parts = (tasks[start : start + most] for start in range(0, len(tasks), most))
        return [result for part in parts for result in self._run_part(part, shape)]

    def _run_part(self, tasks: Sequence[DeviceTask], shape: Shape) -> Iterator[Upsampled]:
        channel = self._channel
        size = next(size for size in self._sizes if size >= len(tasks))
        run = self._listed.get((shape, size)) or self._bind(shape, size, NO_GRAPH)
        height, width = shape
        # The padding images of a batch are left over from earlier batches.
        images = channel.input[self._images_at :][: size * height * width * 3]
        for image, task in zip(images.reshape(size, height, width, 3), tasks, strict=False):
            image[:] = task.image
        masks = [np.empty(task.geometry.photo, dtype=np.uint8) for task in tasks]
        confidences = [
            np.empty(task.geometry.photo, dtype=np.uint8) if task.with_confidence else None
            for task in tasks
        ]
        infer_s = upsample_s = 0.0
        for number, pieces in enumerate(plan_rounds(tasks, channel.output.size)):
            records = self._records(tasks, pieces, shape)
            channel.input[: records.nbytes] = records.view(np.uint8)
            with self._lock:
                channel.upload(self._images_at + images.size if number == 0 else records.nbytes)
                if number == 0:
                    run()
                channel.upsample(
                    len(pieces),
                    max(piece.pixels for piece in pieces),
                    len(self._contract.classes),
                )
            last = pieces[-1]
            channel.download(last.offset + last.pixels * (1 + tasks[last.photo].with_confidence))
            seconds = channel.wait()
            infer_s += seconds[0]
            upsample_s += seconds[1]
            for piece in pieces:
                part = slice(piece.first, piece.first + piece.pixels)
                down = channel.output[piece.offset :]
                masks[piece.photo].reshape(-1)[part] = down[: piece.pixels]
                confidence = confidences[piece.photo]
                if confidence is not None:
                    confidence.reshape(-1)[part] = down[piece.pixels : 2 * piece.pixels]
        for mask, confidence in zip(masks, confidences, strict=True):
            yield Upsampled(Labels(mask, confidence), infer_s, upsample_s)

    def _records(
        self, tasks: Sequence[DeviceTask], pieces: Sequence[Piece], shape: Shape
    ) -> npt.NDArray[np.void]:
        """Return the pieces as the kernel reads them: ``(len(pieces),)`` of `PIECE`."""
        grid = [side // self._contract.stride for side in shape]
        records = np.zeros(len(pieces), dtype=PIECE)
        for record, piece in zip(records, pieces, strict=True):
            geometry = tasks[piece.photo].geometry
            # As in `upsampling`: pixel y samples the logits at (y + 0.5) * step - 0.5.
            row_step, column_step = (
                resized * logits / (photo * padded)
                for photo, resized, padded, logits in zip(
                    geometry.photo, geometry.resized, geometry.padded, grid, strict=True
                )
            )
            record["logits"] = piece.photo * len(self._contract.classes) * grid[0] * grid[1]
            record["ids"] = piece.offset
            record["confidence"] = (
                piece.offset + piece.pixels if tasks[piece.photo].with_confidence else NO_CONFIDENCE
            )
            record["row_step"], record["column_step"] = row_step, column_step
            record["first"], record["pixels"] = piece.first, piece.pixels
            record["width"] = geometry.photo[1]
            record["grid_height"], record["grid_width"] = grid
        return records

    def _fits(self, shape: Shape, size: int) -> bool:
        return size * shape[0] * shape[1] <= self._pixels

    def _bind(self, shape: Shape, size: int, graph: int) -> Callable[[], None]:
        return self._network.bind(
            self._channel.input_address + self._images_at,
            self._channel.logits_address,
            size,
            shape,
            graph,
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
