"""A model with its own label set: its names and colours, from 5 to 255 classes."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.artefacts import encode
from tests.browser.actions import PHONE, canvas, choose, expect_result, painted
from tests.browser.test_accessibility import assert_nothing_serious

COLOR_SEED = 7


def label_set(count: int) -> list[dict[str, Any]]:
    """Ids, names and colours of ``count`` classes. Class 0, the background, is named soil."""
    colors = np.random.default_rng(COLOR_SEED).integers(0, 256, (count, 3))
    names = ["soil", *(f"crop {number}" for number in range(1, count))]
    return [
        {"id": number, "name": name, "color": color}
        for number, (name, color) in enumerate(zip(names, colors.tolist(), strict=True))
    ]


def serve(page: Page, labels: list[dict[str, Any]], mask: npt.NDArray[np.uint8]) -> None:
    """Answer as a service whose model has these labels and finds this mask; reload the page."""
    file = io.BytesIO()
    Image.fromarray(mask).convert("P").save(file, "PNG", bits=8)
    present, pixels = np.unique(mask, return_counts=True)
    answer = {
        "classes": [
            {**labels[number], "fraction": share}
            for number, share in zip(present.tolist(), (pixels / mask.size).tolist(), strict=True)
        ],
        "mask": base64.b64encode(file.getvalue()).decode(),
    }

    def segment(route: Route) -> None:
        if route.request.headers["accept"] == "application/json":
            route.fulfill(json=answer)
        else:
            route.fulfill(body=file.getvalue(), content_type="image/png")

    page.route("**/classes*", lambda route: route.fulfill(json={"classes": labels}))
    page.route("**/segment?*", segment)
    page.reload()


@pytest.mark.parametrize(
    ("count", "known"),
    [
        (1, ""),
        (2, "The model recognises crop 1."),
        (5, "The model recognises crop 1, crop 2, crop 3 and crop 4."),
        (6, "The model recognises crop 1, crop 2, crop 3, crop 4 and crop 5."),
        (255, "The model recognises crop 1, crop 2, crop 3, crop 4 and 250 other classes."),
    ],
)
def test_the_classes_of_the_model(page: Page, count: int, known: str) -> None:
    """Introduction, legend and overlay have the names and colours of the label set."""
    labels = label_set(count)
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[:, 48:] = count - 1
    serve(page, labels, mask)
    expect(page.locator("#known")).to_have_text(known)
    choose(page, encode(np.zeros((64, 96, 3), dtype=np.uint8)), "field.png", "image/png")
    expect_result(page, "field.png", (96, 64))
    present = [labels[number] for number in np.unique(mask)]
    rows = page.locator("#legend .class")
    expect(rows.locator(".class-name")).to_have_text([one["name"] for one in present])
    for swatch, one in zip(rows.locator(".swatch").all(), present, strict=True):
        red, green, blue = one["color"]
        expect(swatch).to_have_css("background-color", f"rgb({red}, {green}, {blue})")
    palette = np.array([one["color"] for one in labels], dtype=np.uint8)
    assert np.array_equal(canvas(page, "overlay"), painted(mask, palette=palette))


def test_a_picture_with_every_class(open_page: Callable[..., Page]) -> None:
    """255 classes, one with a long name, fit a phone. The overlay has all their colours."""
    page = open_page(viewport=PHONE)
    labels = label_set(255)
    labels[1]["name"] = "long_name_" * 6
    mask = np.arange(255, dtype=np.uint8).repeat(64).reshape(255, 64)
    serve(page, labels, mask)
    expect(page.locator("#known")).to_contain_text("long_name_")
    assert_nothing_serious(page)
    choose(page, encode(np.zeros((255, 64, 3), dtype=np.uint8)), "field.png", "image/png")
    expect_result(page, "field.png", (64, 255))
    expect(page.locator("#legend .class")).to_have_count(255)
    palette = np.array([one["color"] for one in labels], dtype=np.uint8)
    assert np.array_equal(canvas(page, "overlay"), painted(mask, palette=palette))
    assert_nothing_serious(page)


def test_every_class_hidden(page: Page) -> None:
    """A view without the shown classes requests the background by the name in the label set."""
    serve(page, label_set(5), np.full((64, 96), 2, dtype=np.uint8))
    choose(page, encode(np.zeros((64, 96, 3), dtype=np.uint8)), "field.png", "image/png")
    expect_result(page, "field.png", (96, 64))
    page.locator("#legend").get_by_role("button", name="crop 2").click()
    with page.expect_request("**/segment?*") as request:
        page.get_by_role("button", name="Overlay", exact=True).click()
    assert "classes=soil" in request.value.url
