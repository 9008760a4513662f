"""Photos over HTTP: ours against the peers, with the same network and with each one's best.

The sides run one at a time and alternate (A B C, A B C, ...). Each starts afresh in each round, so
that other load on the machine affects all of them.
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
from tests.benchmarks import photos, sides
from tests.benchmarks.bench import Bench
from tests.benchmarks.load import Measurement
from tests.benchmarks.peers import pipeline
from tests.benchmarks.servers import Running, running
from tests.benchmarks.sides import OURS, TORCH_PEER

SATURATION: Final = 8
"""Number of connections for comparing throughput."""

CONNECTIONS: Final = (1, 2, 4, 8, 16)
OPEN_LOOP_SHARE: Final = 0.75
"""Rate of the open loop, as a share of the best peer's capacity: the same for all sides."""

AGREEMENT: Final = 0.999
"""Required share of equal pixels between masks of the same network."""


def fp32(bench: Bench) -> None:
    """Measure all sides with the same fp32 file, and PyTorch with torchvision's network."""
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
        # Without peers the rate follows our own capacity.
        fastest = (best_peers(bench) or [OURS])[0]
        rate = OPEN_LOOP_SHARE * capacity(bench, "fp32", fastest)


def _closed(
    server: Running, paths: Sequence[Path], connections: int, seconds: float
) -> Measurement:
    """A window of ``seconds``; for PyTorch, which takes seconds per photo, a number of photos.

    Its handler runs all requests at once, so its answers arrive in bursts of ``connections``.
    """
    if server.side.name == TORCH_PEER:
        return server.closed(paths, connections, 60.0, warm_up_s=0.0, requests=2 * connections)
    return server.closed(paths, connections, seconds)


def best_precision(bench: Bench) -> None:
    """Measure each side's best precision: ours chooses; the two best peers try all of theirs.

    On this CPU a peer's own means are the fp32 file and PyTorch's bfloat16 (AMX). Our int8 file is
    this project's work, so a peer that runs it is a side of its own.
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
    """Measure each peer's settings with the fp32 file, to find `sides.BEST`."""
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
    """Measure everything but the network: HTTP, decoding, upsampling, encoding.

    With ``mask`` the peers' network returns the finished mask, so only ours upsamples. With
    ``logits`` all sides upsample. With ``decoded`` a peer decodes the photo and encodes the mask:
    it does not even resize.
    """
    photo = bench.photos[0]
    data = _store_logits(bench)
    everyone = [(sides.ours(bench.artefact, "fp32", pipe_data=data), "logits")]
    if not bench.quick:
        for name in sides.BATCHING_PEERS:
            everyone.append((sides.peer(name, "null-mask", data), "mask"))
            everyone.append((sides.peer(name, "null-logits", data), "logits"))
        everyone.append((sides.peer(sides.LEAST_PEER, "decoded-only", data), "decoded"))
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
    """Measure one photo at a time over HTTP against the bare session on the same padded pixels.

    Both use the service's settings and alternate after ten photos. A photo of 12 megapixels, which
    has the same padded shape, is measured too.
    """
    model = load_model(bench.artefact, "cpu", Settings().threads, precision=precision)
    photo = bench.photos[0]
    large = photos.large_photo(bench.out / "photos", photo)
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
    """Compare a server's masks with ``reference``, which the first server (ours) fills."""
    least = 1.0
    for path in paths or bench.photos:
        with Image.open(io.BytesIO(server.answer(path))) as image:
            mask = np.asarray(image)
        wanted = reference.setdefault(path, mask)
        equal = float((mask == wanted).mean()) if mask.shape == wanted.shape else 0.0
        least = min(least, equal)
    bench.masks[f"{what}/{server.side.name}"] = least


def disagreements(masks: Mapping[str, float]) -> list[str]:
    """The sides whose masks differ from ours in more pixels than `AGREEMENT` allows.

    The int8 networks are left out, because they amplify differences in rounding between libraries.
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
    """The peers measured with the fp32 file, the fastest at saturation first."""
    found = {name: capacity(bench, "fp32", name) for name in sides.BATCHING_PEERS}
    measured = [name for name, throughput in found.items() if not math.isnan(throughput)]
    return sorted(measured, key=lambda name: -found[name])


def _store_logits(bench: Bench) -> Path:
    """Run the network on the first photo; store its logits and mask for the null networks."""
    model = load_model(bench.artefact, "cpu", precision="fp32")
    prepared = pipeline.decode(bench.photos[0].read_bytes())
    logits = model.run(prepared.pixels[None])
    mask = pipeline.upsample(torch.from_numpy(logits[0]), prepared)
    path = bench.out / "pipe.npz"
    np.savez(path, logits=logits, mask=mask, contract=model.contract.model_dump_json())
    return path
