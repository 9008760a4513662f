"""The network in PyTorch, served as usual without ONNX: fp16, channels last, compiled.

    python -m tests.benchmarks.gpu_torch DEVICE NETWORK quick|whole LIMIT_S

Prints each figure as a line of JSON at once, so that an interrupted run keeps its figures. Needs
only torch and numpy, because it runs in the user's environment. As in ONNX Runtime's runs, the
uint8 photos start on the device and the float32 logits stay there.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.networks import build_network
from tests.benchmarks.bench import first_line, seconds_each

SIDE = 512
LEAST_S = 0.15
"""The shortest duration of one timing."""


class FromBytes(nn.Module):
    """``image (N, H, W, 3)`` uint8 RGB -> ``logits (N, 21, H/stride, W/stride)`` float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, image: Tensor) -> Tensor:
        """Run the network; the bytes already have the channels-last layout."""
        logits: Tensor = self.network(image.permute(0, 3, 1, 2).to(self.dtype))
        return logits.float()


def emit(**row: Any) -> None:  # noqa: ANN401 - names and figures
    """Print one figure."""
    print(json.dumps(row), flush=True)


def sides(quick: bool) -> Iterator[tuple[str, dict[str, Any], bool, int]]:
    """The variants, the most important first: name, compiler options, freezing, batch."""
    eager: dict[str, Any] = {}
    default = {"dynamic": False}
    graphs = {"dynamic": False, "mode": "reduce-overhead"}
    yield "eager", eager, False, 16
    yield "compiled", default, False, 16
    if quick:
        return
    yield "eager", eager, False, 64
    yield "compiled, weights frozen", default, True, 16
    yield "compiled, weights frozen", default, True, 64
    yield "compiled", default, False, 64
    yield "eager", eager, False, 1
    yield "compiled, CUDA graphs", graphs, False, 1
    yield "compiled, CUDA graphs", graphs, False, 16


def main() -> int:
    """Measure until the time limit."""
    device_name, network_name, extent, limit_s = sys.argv[1:]
    started = time.monotonic()
    if device_name != "cpu" and not torch.cuda.is_available():
        emit(not_measured=f"torch {torch.__version__} in {sys.executable} has no CUDA")
        return 0
    on_gpu = device_name != "cpu"
    device = torch.device(device_name)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    dtype = torch.float16 if on_gpu else torch.float32
    torch.backends.cudnn.benchmark = True
    module = FromBytes(build_network(network_name), dtype).eval().to(device, dtype)
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if on_gpu:
        torch.cuda.set_device(device)
        # Matrix products reach their highest rate at about this size.
        matrix = torch.randn(8192, 8192, device=device, dtype=dtype)
        seconds = min(seconds_each(lambda: matrix @ matrix, wait, LEAST_S))
        emit(what="matrices", side="torch", tflop_per_s=2 * 8192**3 / seconds / 1e12)
        del matrix
    for name, options, frozen, batch in sides(extent == "quick"):
        images = batch if on_gpu else 1
        row = {"side": name, "shape": f"{SIDE}x{SIDE}", "batch": images}
        row |= {"precision": str(dtype).removeprefix("torch."), "torch": torch.__version__}
        if time.monotonic() - started > 0.8 * float(limit_s):
            emit(**row, error="no time left")
            continue
        try:
            measure(module, row, options, frozen, images, device, wait)
        # If one variant fails, the others still get their figures.
        except Exception as exc:  # noqa: BLE001
            emit(**row, error=first_line(exc))
    return 0


def measure(
    module: nn.Module,
    row: dict[str, Any],
    options: dict[str, Any],
    frozen: bool,
    batch: int,
    device: torch.device,
    wait: Callable[[], None],
) -> None:
    """Compile the module if there are options, and measure it."""
    import torch._inductor.config as inductor

    inductor.freezing = frozen
    torch.compiler.reset()
    run = torch.compile(module, **options) if options else module
    image = torch.randint(0, 256, (batch, SIDE, SIDE, 3), dtype=torch.uint8, device=device)
    # Freezing folds weights only where gradients are disabled.
    with torch.no_grad():
        started = time.perf_counter()
        run(image)
        wait()
        compile_s = time.perf_counter() - started
        seconds = seconds_each(lambda: run(image), wait, LEAST_S)
    emit(
        **row,
        images_per_s=batch / statistics.median(seconds),
        ms=1000 * statistics.median(seconds),
        first_run_s=compile_s,
    )


if __name__ == "__main__":
    sys.exit(main())
