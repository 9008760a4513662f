"""ONNX Runtime's execution providers: their names, and the options they are opened with.

Each option that is not the default has its reason beside it. None has been measured on a GPU yet;
``make bench-gpu`` compares them.
Sources: ONNX Runtime, "CUDA Execution Provider" and "TensorRT Execution Provider".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from service.artefact.contract import INPUT_NAME, Precision, Shape

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"

Provider = tuple[str, dict[str, Any]]


def cuda(
    ordinal: int, compute_handle: int, *, precision: Precision, graphs: bool, memory_bytes: int
) -> Provider:
    """The CUDA provider on GPU ``ordinal``, computing on the stream ``compute_handle``.

    ``graphs``: whether runs can be captured as CUDA graphs; ``memory_bytes``: the limit of its
    arena, 0 for none.
    """
    options = {
        "device_id": str(ordinal),
        # The upsampling follows on the same stream, so no thread waits in between.
        "user_compute_stream": str(compute_handle),
        "enable_cuda_graph": _flag(graphs),
        # The default tries every algorithm at each new shape, while a request waits.
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "1",
        # Tensor cores read channels last.
        "prefer_nhwc": _flag(precision == "fp16"),
        # A user of fp32 expects fp32's masks; fp16 is there for tensor cores.
        "use_tf32": "0",
        # The default doubles the arena at each step and would keep twice what it needs.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if memory_bytes:
        options["gpu_mem_limit"] = str(memory_bytes)
    return CUDA, options


def tensorrt(
    ordinal: int,
    compute_handle: int,
    *,
    precision: Precision,
    shapes: Sequence[Shape],
    max_batch: int,
    cache: Path | None,
) -> Provider:
    """The TensorRT provider, with one profile around the listed ``shapes``.

    ``cache``: folder for its engines; without one, it builds them at each start.
    """
    options = {
        "device_id": str(ordinal),
        "user_compute_stream": str(compute_handle),
        "trt_fp16_enable": _flag(precision == "fp16"),
        "trt_profile_min_shapes": _profile(1, shapes, min),
        "trt_profile_opt_shapes": _profile(max_batch, shapes, max),
        "trt_profile_max_shapes": _profile(max_batch, shapes, max),
        "trt_engine_cache_enable": _flag(cache is not None),
        "trt_timing_cache_enable": _flag(cache is not None),
    }
    if cache is not None:
        options["trt_engine_cache_path"] = options["trt_timing_cache_path"] = str(cache)
    return TENSORRT, options


def _profile(batch_size: int, shapes: Sequence[Shape], pick: Any) -> str:  # noqa: ANN401
    height = pick(height for height, _ in shapes)
    width = pick(width for _, width in shapes)
    return f"{INPUT_NAME}:{batch_size}x{height}x{width}x3"


def _flag(value: bool) -> str:
    return "1" if value else "0"
