"""The sources of a picture: file, drop, clipboard, camera, samples. Each gets the right result."""

import base64
import io
from collections.abc import Callable

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect

from tests.artefacts import encode
from tests.browser.actions import (
    CAT,
    PHONE,
    ask_mask,
    canvas,
    choose,
    expect_result,
    expect_trouble,
    painted,
)
from tests.clients import Server

CAT_PHOTO = np.asarray(Image.open(CAT))


def test_choose(page: Page, server: Server) -> None:
    """The canvas contains exactly the server's mask in the model's colours."""
    choose(page, CAT.read_bytes(), "cat.jpg")
    expect_result(page, "cat.jpg", (451, 300))
    assert np.array_equal(canvas(page, "overlay"), painted(ask_mask(server, CAT.read_bytes())))
    shown = canvas(page, "photo")[..., :3].astype(int)
    assert np.abs(shown - CAT_PHOTO).mean() < 2


def test_drop(page: Page) -> None:
    """A file dropped anywhere on the page is segmented. A sign appears during the drag."""
    transfer = page.evaluate_handle(
        """([name, data]) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
            return transfer;
        }""",
        ["dropped.jpg", base64.b64encode(CAT.read_bytes()).decode()],
    )
    page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop the picture")).to_be_visible()
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop the picture")).to_be_hidden()
    expect_result(page, "dropped.jpg", (451, 300))


def test_drop_of_something_else(page: Page) -> None:
    """The page reports that dropped text is not a file, and does not change."""
    transfer = page.evaluate_handle("() => new DataTransfer()")
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    expect(page.get_by_role("alert")).to_have_text(
        "The dropped item is not a file. Save the picture first."
    )


def test_paste(open_page: Callable[..., Page]) -> None:
    """Ctrl+V segments a picture from the real clipboard."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const blob = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        base64.b64encode(encode(CAT_PHOTO)).decode(),
    )
    page.keyboard.press("Control+V")
    expect_result(page, "pasted.png", (451, 300))


def test_samples(page: Page) -> None:
    """One click segments a sample, and the model finds a class in each."""
    for name, size in (("Cat", (451, 300)), ("Coffee cup", (600, 400))):
        page.get_by_role("button", name=name).click()
        expect_result(page, f"{name.split()[0].lower()}.jpg", size)
        expect(page.locator("#legend").get_by_role("button").first).to_be_visible()


def test_camera(open_page: Callable[..., Page]) -> None:
    """The page takes a live picture and then releases the camera."""
    page = open_page(permissions=["camera"])
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.locator("#facts")).to_contain_text("camera.jpg", timeout=60_000)
    expect(page.locator("#camera-video")).to_have_js_property("srcObject", None)


def test_camera_refused(page: Page) -> None:
    """Without permission the dialog gives the reason and offers a file instead."""
    page.get_by_role("button", name="Use the camera").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("status")).to_contain_text("blocks the camera for this page")
    with page.expect_file_chooser() as chooser:
        dialog.get_by_role("button", name="Choose a picture instead").click()
    chooser.value.set_files(CAT)
    expect_result(page, "cat.jpg", (451, 300))
    expect(dialog).to_be_hidden()


def test_camera_of_a_phone(open_page: Callable[..., Page]) -> None:
    """A phone opens its own camera app."""
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Use the camera").tap()
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files(CAT)
    expect_result(page, "cat.jpg", (451, 300))


def test_a_photo_with_an_exif_orientation(page: Page, server: Server) -> None:
    """Photo and mask are both upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(CAT_PHOTO, "JPEG", quality=95, exif=exif)
    choose(page, data)
    expect_result(page, "photo.jpg", (300, 451))
    upright = np.rot90(CAT_PHOTO, -1).astype(int)
    assert np.abs(canvas(page, "photo")[..., :3] - upright).mean() < 3
    assert np.array_equal(canvas(page, "overlay"), painted(ask_mask(server, data)))


def test_a_format_that_the_browser_cannot_show(page: Page) -> None:
    """The page shows a TIFF as the server decodes it."""
    choose(page, encode(CAT_PHOTO, "TIFF"), "scan.tif", "image/tiff")
    expect_result(page, "scan.tif", (451, 300))
    assert np.array_equal(canvas(page, "photo")[..., :3], CAT_PHOTO)


def test_a_transparent_picture(page: Page) -> None:
    """Transparent pixels are white, as in the server."""
    image = Image.fromarray(CAT_PHOTO).convert("RGBA")
    image.putalpha(0)
    file = io.BytesIO()
    image.save(file, "PNG")
    choose(page, file.getvalue(), "clear.png", "image/png")
    expect_result(page, "clear.png", (451, 300))
    assert (canvas(page, "photo") == 255).all()


def test_detail(page: Page, server: Server) -> None:
    """More detail requests a larger side and segments the same picture again."""
    page.get_by_role("button", name="Cat").click()
    expect_result(page, "cat.jpg", (451, 300))
    with page.expect_response("**/segment?*") as response:
        page.get_by_label("Detail").select_option("Fine")
    assert "max_side=768" in response.value.url
    expect_result(page, "cat.jpg", (451, 300))
    mask = ask_mask(server, CAT.read_bytes(), max_side="768")
    assert np.array_equal(canvas(page, "overlay"), painted(mask))


def test_another_model(page: Page, server: Server) -> None:
    """With several models the user can choose one. The page requests it and its classes by name."""
    default = httpx.get(f"{server.url}/models").json()["models"][0]
    other = {**default, "name": "other", "default": False}
    page.route("**/models", lambda route: route.fulfill(json={"models": [default, other]}))
    page.route("**/classes?model=other", lambda route: route.fulfill(json={"classes": []}))
    page.reload()
    page.get_by_role("button", name="Cat").click()
    expect_result(page, "cat.jpg", (451, 300))
    with (
        page.expect_response("**/segment?*") as response,
        page.expect_response("**/classes?model=other"),
    ):
        page.get_by_label("Model").select_option("other")
    assert "model=other" in response.value.url
    expect_trouble(page, "The server does not have this model")


def test_the_next_picture_takes_the_place_of_the_last(page: Page) -> None:
    """An unreadable picture between them does not remove the last result."""
    page.get_by_role("button", name="Coffee cup").click()
    expect_result(page, "coffee.jpg", (600, 400))
    choose(page, b"no picture at all", "notes.txt", "text/plain")
    expect_trouble(page, "This file is not a supported picture")
    page.get_by_role("button", name="Back to the last result").click()
    expect_result(page, "coffee.jpg", (600, 400))
    expect(page.locator("#curl")).to_contain_text("coffee.jpg")
    choose(page, CAT.read_bytes(), "cat.jpg")
    expect_result(page, "cat.jpg", (451, 300))
