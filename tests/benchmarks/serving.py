"""Photos over HTTP: ours against the peers, with the same network and with each side's best.

Sides run one at a time and in turns (A B C, A B C, ...), each turn with a fresh start, so that
what the machine does meanwhile meets all of them.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from service.inference.session import load_model
from service.settings import Settings
from tests.benchmarks import photos as photo_files
from tests.benchmarks import sides
from tests.benchmarks.bench import Bench
from tests.benchmarks.load import Measurement
from tests.benchmarks.peers import pipeline
from tests.benchmarks.servers import Running, running
from tests.benchmarks.sides import OURS, TORCH_PEER

SATURATION: Final = 8
"""Connections at which throughput is compared."""

CONNECTIONS: Final = (1, 2, 4, 8, 16)
OPEN_LOOP_SHARE: Final = 0.75
"""The open loop's rate, as a share of the best peer's capacity: all sides get the same arrivals."""

AGREEMENT: Final = 0.999
"""Equal pixels that masks of the same network must have."""


def fp32(bench: Bench) -> None:
    """Everybody with the same fp32 file; beside them PyTorch with torchvision's network."""
    network = bench.artefact / sides.FP32_FILE
    everyone = [sides.ours(bench.artefact, "fp32")]
    if not bench.quick:
        everyone += [sides.peer(name, "onnx", network) for name in sides.BATCHING_PEERS]
        everyone += [sides.peer(TORCH_PEER, "torchvision-fp32", network)]
    reference: dict[Path, npt.NDArray[np.uint8]] = {}
    rate = 0.0
    for turn in range(bench.rounds):
        for side in everyone:
            with running(side, bench.photos[0], bench.logs) as server:
                row = {"part": "serving", "precision": "fp32", "round": turn, "side": side.name}
                bench.add(**row, load="start", start_s=server.start_s)
                if turn == 0 and side.name != TORCH_PEER:
                    compare_masks(bench, "fp32", server, reference)
                everywhere = CONNECTIONS if turn == 0 and not bench.quick else (1, SATURATION)
                for connections in everywhere:
                    seconds = 10.0 if connections == SATURATION else 4.0
                    window = _closed(server, bench.photos, connections, seconds)
                    bench.add(**row, load="closed", connections=connections, **window.summary())
                if rate and side.name != TORCH_PEER:
                    window = server.open(bench.photos, rate, 10.0)
                    bench.add(**row, load="open", rate_per_s=rate, **window.summary())
        # Ours alone has its own capacity to go by.
        fastest = (best_peers(bench) or [OURS])[0]
        rate = OPEN_LOOP_SHARE * capacity(bench, "fp32", fastest)


def _closed(
    server: Running, photos: Sequence[Path], connections: int, seconds: float
) -> Measurement:
    """A window of so many seconds; for PyTorch's seconds per photo, a number of photos instead.

    Its handler works on all of them at once, so that answers come in bursts of ``connections``.
    """
    if server.side.name == TORCH_PEER:
        return server.closed(photos, connections, 60.0, warm_up_s=0.0, requests=2 * connections)
    return server.closed(photos, connections, seconds)


def best_precision(bench: Bench) -> None:
    """Each side's best: what ours picks by itself; the two best peers with everything they have.

    A peer's own means on this CPU are bfloat16 in PyTorch (AMX) beside the fp32 file; with our
    int8 file it would use what this project made, so that is a column of its own.
    """
    everyone = [sides.ours(bench.artefact, "auto")]
    int8 = bench.artefact / sides.INT8_FILE
    if not bench.quick:
        for name in best_peers(bench)[:2]:
            bf16 = sides.peer(name, "context-bf16", bench.artefact / sides.FP32_FILE)
            everyone.append(sides.renamed(bf16, f"{name}, torch bf16"))
            if int8.is_file():
                everyone.append(sides.renamed(sides.peer(name, "onnx", int8), f"{name}, our int8"))
    reference: dict[Path, npt.NDArray[np.uint8]] = {}
    for turn in range(bench.rounds):
        for side in everyone:
            with running(side, bench.photos[0], bench.logs) as server:
                row = {"part": "serving", "precision": "best", "round": turn, "side": side.name}
                if turn == 0 and "bf16" not in side.name:
                    compare_masks(bench, "best", server, reference)
                for connections, seconds in ((1, 4.0), (SATURATION, 8.0)):
                    window = server.closed(bench.photos, connections, seconds)
                    bench.add(**row, load="closed", connections=connections, **window.summary())


def sweep(bench: Bench) -> None:
    """Each peer's settings, with the fp32 file: where `sides.BEST` comes from."""
    network = bench.artefact / sides.FP32_FILE
    for name in (*sides.BATCHING_PEERS, TORCH_PEER):
        for setting in sides.SWEEP:
            if setting.batch > 1 and name.startswith("FastAPI"):
                continue
            engine = "torchvision-fp32" if name == TORCH_PEER else "onnx"
            side = sides.peer(name, engine, network, setting)  # type: ignore[arg-type]
            with running(side, bench.photos[0], bench.logs) as server:
                window = server.closed(bench.photos, SATURATION, 8.0, warm_up_s=2.0)
                bench.add(part="sweep", side=name, setting=str(setting), **window.summary())


def pipe(bench: Bench) -> None:
    """Everything but the network, which costs nothing: HTTP, decoding, upsampling, encoding.

    ``mask``: the peers' network hands over the finished mask, so they upsample nothing while ours
    does; ``logits``: everybody upsamples.
    """
    photo = bench.photos[0]
    data = _store_logits(bench)
    everyone = [(sides.ours(bench.artefact, "fp32", pipe_data=data), "logits")]
    if not bench.quick:
        for name in sides.BATCHING_PEERS:
            everyone.append((sides.peer(name, "null-mask", data), "mask"))
            everyone.append((sides.peer(name, "null-logits", data), "logits"))
    reference: dict[Path, npt.NDArray[np.uint8]] = {}
    for turn in range(bench.rounds):
        for side, network in everyone:
            with running(side, photo, bench.logs) as server:
                row = {"part": "pipe", "network": network, "round": turn, "side": side.name}
                if turn == 0:
                    compare_masks(bench, f"pipe {network}", server, reference, [photo])
                window = server.closed([photo], SATURATION, 4.0)
                bench.add(**row, load="closed", connections=SATURATION, **window.summary())


def latency(bench: Bench, precision: sides.Precision) -> None:
    """One photo at a time over HTTP against the bare session on the same padded pixels.

    Both with the service's own settings, in turns of ten; and photos of 12 megapixels, whose
    padded shape is the same.
    """
    model = load_model(bench.artefact, "cpu", Settings().threads, precision=precision)
    photo = bench.photos[0]
    large = bench.out / "photos" / "12_megapixels.jpg"
    large.write_bytes(photo_files.resized(photo, photo_files.MEGAPIXELS_12))
    image = pipeline.decode(photo.read_bytes()).pixels[None]
    with running(sides.ours(bench.artefact, precision), photo, bench.logs) as server:
        for _ in range(3):
            model.run(image)
            server.answer(photo)
            server.answer(large)
        for turn in range(3 if bench.quick else 8):
            row = {"part": "latency", "precision": precision, "round": turn, "load": "alone"}
            bare_ms = []
            for _ in range(10):
                started = time.perf_counter()
                model.run(image)
                bare_ms.append((time.perf_counter() - started) * 1000)
            bench.add(**row, side="bare session", p50_ms=statistics.median(bare_ms))
            for name, path, requests in (("500x375", photo, 10), ("4000x3000", large, 5)):
                window = server.closed([path], 1, 60.0, warm_up_s=0.0, requests=requests)
                bench.add(**row, side=name, **window.summary())


def compare_masks(
    bench: Bench,
    what: str,
    server: Running,
    reference: dict[Path, npt.NDArray[np.uint8]],
    paths: Sequence[Path] | None = None,
) -> None:
    """The first server (ours) fills ``reference``, the others are held against it."""
    least = 1.0
    for path in paths or bench.photos:
        with Image.open(io.BytesIO(server.answer(path))) as image:
            mask = np.asarray(image)
        wanted = reference.setdefault(path, mask)
        equal = float((mask == wanted).mean()) if mask.shape == wanted.shape else 0.0
        least = min(least, equal)
    bench.masks[f"{what}/{server.side.name}"] = least


def disagreements(masks: Mapping[str, float]) -> list[str]:
    """The sides whose masks differ from ours in more pixels than may be.

    Without the int8 networks: they make more of a pixel that one library rounds up and another one
    down, so theirs are reported only.
    """
    return [
        name for name, equal in masks.items() if equal < AGREEMENT and not name.startswith("best/")
    ]


def capacity(bench: Bench, precision: str, side: str) -> float:
    """Median throughput at saturation."""
    return bench.median(
        "throughput",
        part="serving",
        precision=precision,
        side=side,
        load="closed",
        connections=SATURATION,
    )


def best_peers(bench: Bench) -> list[str]:
    """The peers that were measured with the fp32 file, the fastest at saturation first."""
    found = {name: capacity(bench, "fp32", name) for name in sides.BATCHING_PEERS}
    measured = [name for name, throughput in found.items() if not math.isnan(throughput)]
    return sorted(measured, key=lambda name: -found[name])


def _store_logits(bench: Bench) -> Path:
    """Run the network once on the first photo; store what the null networks answer from."""
    model = load_model(bench.artefact, "cpu", precision="fp32")
    prepared = pipeline.decode(bench.photos[0].read_bytes())
    logits = model.run(prepared.pixels[None])
    mask = pipeline.upsample(torch.from_numpy(logits[0]), prepared)
    path = bench.out / "pipe.npz"
    np.savez(path, logits=logits, mask=mask, contract=model.contract.model_dump_json())
    return path
