"""Shared steps of the page's tests."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from playwright.sync_api import Page, ViewportSize, expect

from service.artefact import voc
from tests.clients import Server, mask_of

DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 360, "height": 740}

SAMPLES = Path(__file__).parents[2] / "service" / "static" / "samples"
CAT = SAMPLES / "cat.jpg"
ASTRONAUT = SAMPLES / "astronaut.jpg"
PERSON = voc.CLASSES.index("person")

SLOWLY_MS = 60_000
"""The longest wait for an answer. `expect` returns as soon as its condition holds."""


def choose(
    page: Page, data: bytes, name: str = "photo.jpg", media_type: str = "image/jpeg"
) -> None:
    """Choose a file, as in the file dialog."""
    page.get_by_label("Choose a picture", exact=True).set_input_files(
        {"name": name, "mimeType": media_type, "buffer": data}
    )


def expect_result(page: Page, name: str, size: tuple[int, int]) -> None:
    """The page shows the result of the picture with this name, width and height."""
    facts = f"{name} · {size[0]} \N{MULTIPLICATION SIGN} {size[1]}"
    expect(page.locator("#facts")).to_have_text(facts, timeout=SLOWLY_MS)
    expect(page.locator("#result")).to_be_visible()


def expect_trouble(page: Page, title: str) -> None:
    """The page shows the error with this title, and a detail under it."""
    expect(page.get_by_role("alert").get_by_role("heading")).to_have_text(title, timeout=SLOWLY_MS)
    expect(page.locator("#error-detail")).not_to_be_empty()


def canvas(page: Page, name: str) -> npt.NDArray[np.uint8]:
    """The pixels of a canvas: ``(H, W, 4) uint8`` RGBA."""
    url: str = page.evaluate("name => document.getElementById(name).toDataURL()", name)
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


def painted(
    mask: npt.NDArray[np.uint8],
    *hidden: int,
    palette: npt.NDArray[np.uint8] = voc.FULL_PALETTE,
) -> npt.NDArray[np.uint8]:
    """The expected overlay canvas: ``(H, W, 4) uint8`` RGBA, transparent for background and hidden.

    ``palette``: ``(n, 3) uint8`` RGB, one row for each class id.
    """
    shown = np.where(np.isin(mask, hidden), 0, mask)
    opaque = np.where(shown == 0, 0, 255).astype(np.uint8)
    colors = np.where(shown[..., None] == 0, 0, palette[shown])
    return np.dstack((colors.astype(np.uint8), opaque))


def ask(server: Server, data: bytes, accept: str = "*/*", **parameters: str) -> httpx.Response:
    """The server's answer to a direct request with the same photo."""
    response = httpx.post(
        f"{server.url}/segment",
        content=data,
        params=parameters,
        headers={"Accept": accept},
        timeout=300,
    )
    assert response.status_code == 200, response.text
    return response


def ask_mask(server: Server, data: bytes, **parameters: str) -> npt.NDArray[np.uint8]:
    """The class ids of the server's mask: ``(H, W) uint8``."""
    return mask_of(ask(server, data, **parameters))


def move_over(page: Page, x: int, y: int) -> None:
    """Move the mouse over a pixel of the picture."""
    left, top = place_of(page, x, y)
    page.mouse.move(left, top)


def place_of(page: Page, x: int, y: int) -> tuple[float, float]:
    """The page coordinates of the middle of a pixel of the picture."""
    box = page.locator("#photo").bounding_box()
    assert box is not None
    width, height = page.evaluate(
        "() => [document.querySelector('#photo').width, document.querySelector('#photo').height]"
    )
    return (
        box["x"] + (x + 0.5) * box["width"] / width,
        box["y"] + (y + 0.5) * box["height"] / height,
    )


def inside_of(mask: npt.NDArray[np.uint8], class_id: int) -> tuple[int, int]:
    """``(x, y)`` of a pixel with only its own class within 6 pixels."""
    inside = mask == class_id
    for shift in range(-6, 7):
        inside = inside & np.roll(mask == class_id, shift, axis=0)
    for shift in range(-6, 7):
        inside = inside & np.roll(inside, shift, axis=1)
    y, x = np.argwhere(inside)[len(np.argwhere(inside)) // 2].tolist()
    return x, y


def width_of(page: Page, selector: str = "#layers") -> float:
    """The width of an element on the page, in CSS pixels."""
    box: Any = page.locator(selector).bounding_box()
    width: float = box["width"]
    return width
