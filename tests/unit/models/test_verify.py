from typing import Any

import pytest

from models.stages.verify import passes


def report(**changes: dict[str, float]) -> dict[str, Any]:
    """The result of `compare_set` for networks that all give torch's masks."""
    same = {"fp32": 1.0, "fp16": 1.0, "int8": 1.0}
    iou = {"torch": 0.5, "fp32": 0.5, "fp16": 0.5, "int8": 0.5}
    return {
        "pixel_agreement": {**same, **changes.get("pixel_agreement", {})},
        "mean_iou": {**iou, **changes.get("mean_iou", {})},
    }


SHAPES = [{"pixel_agreement": 1.0}]


def test_networks_that_agree_pass() -> None:
    """So do a better mean IoU and an artefact of one precision."""
    assert passes(SHAPES, report(mean_iou={"fp16": 0.6}))
    assert passes(SHAPES, {"pixel_agreement": {"fp32": 1.0}, "mean_iou": {"torch": 0, "fp32": 0}})


@pytest.mark.parametrize(
    "changes",
    [
        {"pixel_agreement": {"fp32": 0.9998}},
        {"pixel_agreement": {"fp16": 0.998}},
        {"pixel_agreement": {"int8": 0.979}},
        {"mean_iou": {"fp32": 0.4994}},
        {"mean_iou": {"fp16": 0.4994}},
        {"mean_iou": {"int8": 0.4949}},
        {"mean_iou": {"fp16": float("nan")}},
    ],
)
def test_each_gate_can_fail(changes: dict[str, dict[str, float]]) -> None:
    """One figure below its gate is enough."""
    assert not passes(SHAPES, report(**changes))


def test_a_shape_can_fail() -> None:
    """fp32 is compared on batches of several shapes too."""
    assert not passes([*SHAPES, {"pixel_agreement": 0.9}], report())
