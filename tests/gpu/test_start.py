"""A missing GPU stops the start with one line if it was required; otherwise the CPU serves."""

import contextlib
import json
import subprocess
from typing import Any

import pytest

from service.settings import DEFAULT_MODEL
from tests.clients import command_line, environment, fails


@pytest.mark.parametrize(
    ("visible", "device"),
    [("", "cuda"), ("", "cuda:0"), (None, "cuda:99")],
    ids=["no GPU", "no first GPU", "no hundredth GPU"],
)
def test_a_required_gpu_that_is_missing(
    visible: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit status is 1, and one line names the device and the reason."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    status, stderr = fails(
        "serve", "--port", "0", "--device", device, model=DEFAULT_MODEL, log_level="warning"
    )
    assert status == 1
    assert stderr.startswith(f"fcn-segment: device {device} was asked for, but ")
    assert stderr.count("\n") == 1
    # There is a reason after the comma.
    assert len(stderr.partition(", but ")[2].strip()) > 10


def test_auto_serves_on_the_cpu_and_logs_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``model ready`` line has the reason why no GPU is used."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ready = _model_ready(device="auto")
    assert ready["provider"] == "CPUExecutionProvider"
    assert len(ready["no_gpu"]) > 10


def test_auto_serves_on_the_gpu_and_logs_which() -> None:
    """The ``model ready`` line has the GPU's name and its used memory after the warm-up."""
    ready = _model_ready(device="auto")
    assert ready["provider"] == "CUDAExecutionProvider"
    assert ready["gpu"]
    used, total = map(int, ready["gpu_memory_mb"].split("/"))
    assert 0 < used < total
    assert "no_gpu" not in ready


def _model_ready(**variables: object) -> dict[str, Any]:
    """The ``model ready`` line that `serve` logs; the server is stopped once it listens."""
    process = subprocess.Popen(
        command_line("serve", "--port", "0"),
        env=environment(model=DEFAULT_MODEL, log_format="json", **variables),
        stderr=subprocess.PIPE,
        text=True,
    )
    events: dict[str, dict[str, Any]] = {}
    try:
        assert process.stderr is not None
        for line in process.stderr:
            # ONNX Runtime may log lines that are not JSON.
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                events[event["event"]] = event
            if "listening" in events:
                break
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert "listening" in events, events
    return events["model ready"]
