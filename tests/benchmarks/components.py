"""Single stages by image size, against common libraries: time, CPU time, peak memory.

    python -m tests.benchmarks.components CASE SIDE FOLDER

prints the peak memory of one case in MiB, measured in a process of its own. Times are measured in
one process. The sides alternate, each with its default number of threads.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from service.artefact import voc
from service.artefact.preprocessing import Geometry, preprocess
from service.images.decoding import decode
from service.images.encoding import Cutout, Overlay, encode_image, encode_mask
from service.inference.upsampling import upsample

if TYPE_CHECKING:
    from tests.benchmarks.bench import Bench

Work = Callable[[], Any]

SIZES: Final = {"500x375": (500, 375), "1920x1080": (1920, 1080), "4000x3000": (4000, 3000)}
MAX_PIXELS: Final = 50_000_000
MAX_SIDE: Final = 512
PADDING_COLOR: Final = (124, 116, 104)
CASES: Final = {
    **{f"decoding {size}": ("ours", "Pillow") for size in SIZES},
    **{f"preprocessing {size}": ("ours", "Pillow") for size in SIZES},
    **{f"upsampling {size}": ("ours", "ORT", "torch") for size in SIZES},
    **{f"upsampling noise {size}": ("ours", "ORT", "torch") for size in SIZES},
    **{f"mask to PNG {size}": ("ours", "Pillow") for size in SIZES},
    **{f"overlay to PNG {size}": ("ours", "Pillow") for size in SIZES},
    **{f"cut-out to PNG {size}": ("ours", "Pillow") for size in SIZES},
}
"""The cases and their sides; the last word of a case is the photo's size."""


def measure(bench: Bench) -> None:
    """Measure the time of every case, alternating its sides, and then their peak memory."""
    folder = bench.out / "components"
    store_inputs(folder, bench.photos[0], bench.artefact)
    for case, names in CASES.items():
        work = {name: make(case, name, folder) for name in names}
        results = {name: one() for name, one in work.items()}
        for turn in range(3 if bench.quick else 7):
            for name, one in work.items():
                wall_ms, cpu_ms = _timed(one)
                bench.add(
                    part="component", case=case, round=turn, side=name, ms=wall_ms, cpu_ms=cpu_ms
                )
        if case.startswith("upsampling"):
            for name in names[1:]:
                equal = float((results[name] == results["ours"]).mean())
                bench.masks[f"{case}/{name}"] = equal
        for name in names:
            row = {"part": "component", "case": case, "side": name}
            if isinstance(results[name], bytes):
                bench.add(**row, bytes=len(results[name]))
            if name == names[0] or not bench.quick:
                bench.add(**row, peak_mib=_peak_of(case, name, folder))


def store_inputs(folder: Path, photo: Path, artefact: Path) -> None:
    """Write real logits, masks and photos of every size as files."""
    import torch

    from service.inference.session import load_model
    from tests.benchmarks import photos
    from tests.benchmarks.peers import pipeline

    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(artefact, "cpu")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        jpeg = photos.resized(photo, size)
        (folder / f"{name}.jpg").write_bytes(jpeg)
        prepared = pipeline.decode(jpeg)
        logits = model.run(prepared.pixels[None])
        np.savez(
            folder / f"{name}.npz",
            logits=logits,
            noise=rng.normal(size=logits.shape).astype(np.float32),
            mask=pipeline.upsample(torch.from_numpy(logits[0]), prepared),
            resized=prepared.resized,
            padded=prepared.pixels.shape[:2],
        )


def make(case: str, side: str, folder: Path) -> Work:
    """A function that does a case's work as one side does it, with its inputs loaded."""
    what, _, size = case.rpartition(" ")
    stored = np.load(folder / f"{size}.npz")
    jpeg = (folder / f"{size}.jpg").read_bytes()
    match what, side:
        case ("upsampling" | "upsampling noise", _):
            logits = stored["noise" if what.endswith("noise") else "logits"]
            return _upsampling(side, logits, stored, SIZES[size][::-1])
        case "mask to PNG", "ours":
            return partial(encode_mask, stored["mask"], voc.FULL_PALETTE)
        case "mask to PNG", _:
            from tests.benchmarks.peers.pipeline import to_png

            return partial(to_png, stored["mask"])
        case "preprocessing", "ours":
            # Decoded as the service does: a large photo at a fraction of its size.
            photo = decode(jpeg, MAX_PIXELS, MAX_SIDE)
            padded = tuple(map(int, stored["padded"]))
            geometry = Geometry.plan(photo.size, MAX_SIDE, [padded])  # type: ignore[list-item]
            return partial(preprocess, photo.pixels, geometry, PADDING_COLOR, photo.box)
        case "preprocessing", _:
            from tests.benchmarks.peers.pipeline import prepare

            # As Pillow decodes by default: whole.
            return partial(prepare, Image.open(io.BytesIO(jpeg)).convert("RGB"))
        case "overlay to PNG", "ours":
            overlay = Overlay(_pillow_decode(jpeg), stored["mask"], voc.FULL_PALETTE, 0.5)
            return partial(encode_image, overlay, "PNG")
        case "cut-out to PNG", "ours":
            cutout = Cutout(_pillow_decode(jpeg), stored["mask"], range(1, 21))
            return partial(encode_image, cutout, "PNG")
        case "overlay to PNG", _:
            return partial(_pillow_overlay, Image.fromarray(_pillow_decode(jpeg)), stored["mask"])
        case "cut-out to PNG", _:
            return partial(_pillow_cutout, Image.fromarray(_pillow_decode(jpeg)), stored["mask"])
        case "decoding", "ours":
            return partial(decode, jpeg, MAX_PIXELS)
        case _:
            return partial(_pillow_decode, jpeg)


def _upsampling(side: str, logits: Any, stored: Any, photo: tuple[int, int]) -> Work:  # noqa: ANN401
    resized, padded = tuple(map(int, stored["resized"])), tuple(map(int, stored["padded"]))
    if side == "ours":
        geometry = Geometry(photo, resized, padded)  # type: ignore[arg-type]
        return lambda: upsample(logits[0], geometry).mask
    if side == "ORT":
        return _ort_upsampling(logits, photo, resized, padded)
    import torch

    from tests.benchmarks.peers import pipeline

    prepared = pipeline.Prepared(
        np.empty((*padded, 3), dtype=np.uint8),
        photo,
        resized,  # type: ignore[arg-type]
    )
    tensor = torch.from_numpy(logits[0])
    return lambda: pipeline.upsample(tensor, prepared)


def _ort_upsampling(
    logits: Any,  # noqa: ANN401
    photo: tuple[int, int],
    resized: tuple[int, ...],
    padded: tuple[int, ...],
) -> Work:
    """A graph of Resize and ArgMax, as it could be appended to the network."""
    import onnxruntime as ort  # type: ignore[import-untyped]
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node(
                "Resize",
                ["logits", "", "scales"],
                ["large"],
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            ),
            helper.make_node("ArgMax", ["large"], ["ids"], axis=1, keepdims=0),
            helper.make_node("Cast", ["ids"], ["mask"], to=TensorProto.UINT8),
        ],
        "upsampling",
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 21, "h", "w"]),
            helper.make_tensor_value_info("scales", TensorProto.FLOAT, [4]),
        ],
        [helper.make_tensor_value_info("mask", TensorProto.UINT8, [1, "H", "W"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    stride = padded[0] / logits.shape[2]
    # Slightly more, so that rounding never drops the last row.
    pairs = zip(photo, resized, strict=True)
    scales = [side * stride / small * (1 + 1e-6) for side, small in pairs]
    rows, columns = (
        min(there, int(small / stride) + 2)
        for there, small in zip(logits.shape[2:], resized, strict=True)
    )
    feed = {
        "logits": np.ascontiguousarray(logits[:, :, :rows, :columns]),
        "scales": np.array([1, 1, *scales], dtype=np.float32),
    }
    height, width = photo
    return lambda: session.run(None, feed)[0][0, :height, :width]


def _pillow_decode(jpeg: bytes) -> Any:  # noqa: ANN401
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _pillow_overlay(photo: Image.Image, mask: Any) -> bytes:  # noqa: ANN401
    colors = Image.fromarray(mask)
    colors.putpalette(voc.FULL_PALETTE.tobytes())
    blended = Image.blend(photo, colors.convert("RGB"), 0.5)
    return _pillow_png(Image.composite(blended, photo, Image.fromarray(mask != 0)))


def _pillow_cutout(photo: Image.Image, mask: Any) -> bytes:  # noqa: ANN401
    kept = Image.composite(photo, Image.new("RGB", photo.size), Image.fromarray(mask != 0))
    kept.putalpha(Image.fromarray((mask != 0).astype(np.uint8) * np.uint8(255)))
    return _pillow_png(kept)


def _pillow_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _timed(work: Work) -> tuple[float, float]:
    """Wall and CPU milliseconds per call, averaged over at least 30 ms."""
    calls = 0
    started, cpu_s = time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - started < 0.03:
        work()
        calls += 1
    elapsed = time.perf_counter() - started
    return elapsed * 1000 / calls, (time.process_time() - cpu_s) * 1000 / calls


def _peak_of(case: str, side: str, folder: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.components", case, side, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak: float = json.loads(done.stdout)
    return peak


def _memory_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


def main() -> None:
    """Print by how many MiB one case raises the peak memory."""
    case, side, folder = sys.argv[1:]
    work = make(case, side, Path(folder))
    # Writing 5 resets the peak to the current memory (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    held = _memory_kib("VmRSS")
    work()
    print((_memory_kib("VmHWM") - held) / 1024)


if __name__ == "__main__":
    main()
