"""A GPU that is not there: asked for, it stops the start with one line; else the CPU serves."""

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
def test_a_gpu_that_was_asked_for_and_is_not_there(
    visible: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 1, and one line that says what was asked for and why not."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    status, stderr = fails(
        "serve", "--port", "0", "--device", device, model=DEFAULT_MODEL, log_level="warning"
    )
    assert status == 1
    assert stderr.startswith(f"fcn-segment: device {device} was asked for, but ")
    assert stderr.count("\n") == 1
    # The reason, not just that there is one.
    assert len(stderr.partition(", but ")[2].strip()) > 10


def test_auto_serves_on_the_cpu_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the line that tells of the model, where the operator looks for what serves."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ready = _model_ready(device="auto")
    assert ready["provider"] == "CPUExecutionProvider"
    assert len(ready["no_gpu"]) > 10


def test_auto_serves_on_the_gpu_and_says_which() -> None:
    """Its name, and the memory that is taken once everything is warm."""
    ready = _model_ready(device="auto")
    assert ready["provider"] == "CUDAExecutionProvider"
    assert ready["gpu"]
    used, total = map(int, ready["gpu_memory_mb"].split("/"))
    assert 0 < used < total
    assert "no_gpu" not in ready


def _model_ready(**variables: object) -> dict[str, Any]:
    """What `serve` logs of its model, once it listens; then it is stopped."""
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
            # ONNX Runtime may log lines of its own.
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
