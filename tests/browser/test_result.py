"""The result: legend, colours, contours, class under the pointer, zoom, downloads, curl."""

import io
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from playwright.sync_api import Locator, Page, expect

from service.artefact import voc
from tests.browser.actions import (
    ASTRONAUT,
    CAT,
    PERSON,
    PHONE,
    ask,
    ask_mask,
    canvas,
    choose,
    expect_result,
    inside_of,
    move_over,
    painted,
    place_of,
    width_of,
)
from tests.clients import Server

PHOTO = ASTRONAUT.read_bytes()


@pytest.fixture
def tip(result: Page) -> Locator:
    """The label beside the pointer."""
    return result.locator("#tip")


@pytest.fixture(scope="module")
def pair() -> bytes:
    """The cat beside the astronaut, as PNG: a photo with two classes and background."""
    with Image.open(CAT) as cat, Image.open(ASTRONAUT) as astronaut:
        picture = Image.new("RGB", (2 * astronaut.width, astronaut.height))
        picture.paste(ImageOps.fit(cat.convert("RGB"), astronaut.size), (0, 0))
        picture.paste(astronaut, (astronaut.width, 0))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pair_result(page: Page, pair: bytes) -> Page:
    """The result of the pair."""
    choose(page, pair, "pair.png")
    with Image.open(io.BytesIO(pair)) as picture:
        expect_result(page, "pair.png", picture.size)
    return page


def run_in(folder: Path, command: str) -> None:
    """Run a command in a POSIX shell."""
    subprocess.run(["sh", "-ec", command], cwd=folder, check=True, capture_output=True)


def test_the_legend_tells_the_shares(result: Page, server: Server) -> None:
    """Name, colour and share of each class, largest first, as in the server's answer."""
    classes = ask(server, PHOTO, "application/json").json()["classes"]
    rows = result.locator("#legend .class")
    expect(rows.locator(".class-name")).to_have_text([one["name"] for one in classes])
    expect(rows.locator(".class-share")).to_have_text(
        [f"{one['fraction']:.1%}" if one["fraction"] >= 0.001 else "under 0.1%" for one in classes]
    )
    for row, one in zip(rows.locator(".swatch").all(), classes, strict=True):
        red, green, blue = one["color"]
        expect(row).to_have_css("background-color", f"rgb({red}, {green}, {blue})")


def test_colour_strength(result: Page) -> None:
    """From the photo only to the colours only."""
    slider = result.get_by_label("Colour strength")
    expect(result.locator("#overlay")).to_have_css("opacity", "0.5")
    slider.press("End")
    expect(result.locator("#overlay")).to_have_css("opacity", "1")
    expect(result.locator("#opacity-value")).to_have_text("100%")
    slider.press("Home")
    expect(result.locator("#overlay")).to_have_css("opacity", "0")


def test_hide_a_class_in_the_legend(result: Page, server: Server) -> None:
    """Its colour and its contour disappear, and `Show all` restores them."""
    mask = ask_mask(server, PHOTO)
    person = result.locator("#legend").get_by_role("button", name="person")
    contour = result.locator(f"#contours [data-id='{PERSON}']")
    expect(person).to_have_attribute("aria-pressed", "true")
    person.click()
    expect(person).to_have_attribute("aria-pressed", "false")
    expect(contour).to_be_hidden()
    assert np.array_equal(canvas(result, "overlay"), painted(mask, PERSON))
    result.get_by_role("button", name="Show all").click()
    expect(person).to_have_attribute("aria-pressed", "true")
    expect(contour).to_be_visible()
    expect(result.get_by_role("button", name="Show all")).to_be_hidden()
    assert np.array_equal(canvas(result, "overlay"), painted(mask))


def test_hide_a_class_in_the_picture(result: Page, server: Server, tip: Locator) -> None:
    """A click on a class hides it, a second click shows it. The background cannot be hidden."""
    mask = ask_mask(server, PHOTO)
    move_over(result, *inside_of(mask, PERSON))
    result.mouse.down()
    result.mouse.up()
    person = result.locator("#legend").get_by_role("button", name="person")
    expect(person).to_have_attribute("aria-pressed", "false")
    expect(tip).to_have_text("person (hidden)")
    assert np.array_equal(canvas(result, "overlay"), painted(mask, PERSON))
    result.mouse.down()
    result.mouse.up()
    expect(person).to_have_attribute("aria-pressed", "true")
    move_over(result, *inside_of(mask, 0))
    result.mouse.down()
    result.mouse.up()
    assert np.array_equal(canvas(result, "overlay"), painted(mask))


def test_hover_tells_the_class(pair_result: Page, pair: bytes, server: Server) -> None:
    """Label, legend and a stronger contour mark the class until the pointer leaves."""
    mask = ask_mask(server, pair)
    tip, pointed = pair_result.locator("#tip"), pair_result.locator(".class.pointed")
    for class_id in (0, voc.CLASSES.index("cat"), PERSON):
        move_over(pair_result, *inside_of(mask, class_id))
        expect(tip).to_have_text(voc.CLASSES[class_id])
        expect(pointed.locator(".class-name")).to_have_text(voc.CLASSES[class_id])
    expect(pair_result.locator("#contours .strong")).to_have_attribute("data-id", str(PERSON))
    pair_result.mouse.move(5, 5)
    expect(tip).to_be_hidden()
    expect(pointed).to_have_count(0)


def test_the_keyboard_tells_the_class(result: Page, server: Server, tip: Locator) -> None:
    """Arrow keys move a crosshair. The page announces the class under it, and Enter hides it."""
    mask = ask_mask(server, PHOTO)
    result.locator("#stage").focus()
    result.keyboard.press("ArrowRight")
    middle = voc.CLASSES[mask[256, 256]]
    expect(tip).to_have_text(middle)
    expect(result.locator("#status")).to_have_text(middle)
    for _ in range(5):
        result.keyboard.press("Shift+ArrowUp")
    expect(result.locator("#status")).to_have_text(voc.CLASSES[mask[1, 256]])
    for _ in range(5):
        result.keyboard.press("Shift+ArrowDown")
    result.keyboard.press("Enter")
    expect(result.locator("#status")).to_have_text(f"{middle} hidden")
    result.keyboard.press("Escape")
    expect(result.locator("#crosshair")).to_be_hidden()


def test_contours_lie_where_the_classes_meet(result: Page, server: Server) -> None:
    """The path of a class follows all its edges and no others. A switch hides the contours."""
    inside = ask_mask(server, PHOTO) == PERSON
    path = result.locator(f"#contours [data-id='{PERSON}'] .over").get_attribute("d")
    assert path is not None
    across = np.zeros((513, 512), dtype=bool)
    along = np.zeros((512, 513), dtype=bool)
    for x, y, way, run in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path):
        if way == "h":
            across[int(y), int(x) : int(x) + int(run)] = True
        else:
            along[int(y) : int(y) + int(run), int(x)] = True
    assert np.array_equal(across[1:-1], inside[1:] != inside[:-1])
    assert np.array_equal(along[:, 1:-1], inside[:, 1:] != inside[:, :-1])
    result.get_by_role("switch", name="Contours").click()
    expect(result.locator("#contours")).to_be_hidden()
    result.get_by_role("switch", name="Contours").click()
    expect(result.locator("#contours")).to_be_visible()


def test_zoom_by_wheel_and_pan(result: Page) -> None:
    """The pixel under the pointer stays there. Dragging moves the picture and hides no class."""
    whole = width_of(result)
    before = place_of(result, 200, 150)
    result.mouse.move(*before)
    result.mouse.wheel(0, -400)
    expect(result.locator("#stage")).to_have_class("zoomed")
    assert width_of(result) > 1.5 * whole
    assert place_of(result, 200, 150) == pytest.approx(before, abs=1.5)
    result.mouse.down()
    result.mouse.move(before[0] - 60, before[1] - 40)
    result.mouse.up()
    assert place_of(result, 200, 150) == pytest.approx((before[0] - 60, before[1] - 40), abs=1.5)
    expect(result.locator("#legend [aria-pressed='false']")).to_have_count(0)
    result.mouse.wheel(0, 4000)
    expect(result.locator("#stage")).not_to_have_class("zoomed")
    assert width_of(result) == pytest.approx(whole)


def test_zoom_by_buttons_and_keys(result: Page) -> None:
    """In, out, and back to the whole picture. The crosshair stays visible."""
    whole = width_of(result)
    result.get_by_role("button", name="Zoom in").click()
    assert width_of(result) == pytest.approx(1.5 * whole, rel=0.01)
    result.get_by_role("button", name="Zoom out").click()
    assert width_of(result) == pytest.approx(whole, rel=0.01)
    result.locator("#stage").focus()
    for key in ("+", "+", "+", "-"):
        result.keyboard.press(key)
    assert width_of(result) == pytest.approx(1.5**2 * whole, rel=0.01)
    for _ in range(6):
        result.keyboard.press("Shift+ArrowLeft")
    expect(result.locator("#crosshair")).to_be_in_viewport()
    result.keyboard.press("0")
    assert width_of(result) == pytest.approx(whole)
    result.get_by_role("button", name="Zoom in").click()
    result.get_by_role("button", name="Show the whole picture").click()
    assert width_of(result) == pytest.approx(whole)


def test_zoom_by_pinching(open_page: Callable[..., Page]) -> None:
    """Two fingers zoom. A tap hides a class."""
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    page.get_by_role("button", name="Cat").tap()
    expect_result(page, "cat.jpg", (451, 300))
    whole = width_of(page)
    page.locator("#stage").scroll_into_view_if_needed()
    x, y = place_of(page, 200, 150)
    touch = page.context.new_cdp_session(page)
    for kind, apart in (("touchStart", 20), ("touchMove", 40), ("touchMove", 60)):
        points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect(page.locator("#stage")).to_have_class("zoomed")
    assert width_of(page) == pytest.approx(3 * whole, rel=0.1)
    expect(page.locator("#legend [aria-pressed='false']")).to_have_count(0)
    page.touchscreen.tap(*place_of(page, 200, 150))
    expect(page.locator("#legend [aria-pressed='false']")).to_have_count(1)


def test_downloads(pair_result: Page, pair: bytes, server: Server) -> None:
    """The bytes of the server's answer for the same photo, strength and classes."""
    classes = ask(server, pair, "application/json").json()["classes"]
    kept = [one["name"] for one in classes if one["name"] not in ("background", "cat")]
    shown = {"classes": ",".join(kept)}
    pair_result.locator("#legend").get_by_role("button", name="cat").click()
    pair_result.get_by_label("Colour strength").fill("70")
    for button, name, parameters in (
        ("Mask", "mask", {}),
        ("Overlay", "overlay", {"view": "overlay", "alpha": "0.7", **shown}),
        ("Cutout", "cutout", {"view": "cutout", **shown}),
        ("Confidence", "confidence", {"view": "confidence", **shown}),
    ):
        with pair_result.expect_download() as download:
            pair_result.get_by_role("button", name=button, exact=True).click()
        assert download.value.suggested_filename == f"pair-{name}.png"
        expected = ask(server, pair, "image/png", **parameters).content
        assert Path(download.value.path()).read_bytes() == expected


def test_a_download_that_fails(result: Page) -> None:
    """The page shows the reason under the buttons and keeps the result."""
    result.context.set_offline(True)
    result.get_by_role("button", name="Overlay", exact=True).click()
    expect(result.locator("#download-note")).to_contain_text("The server cannot be reached")
    expect(result.locator("#result")).to_be_visible()


def test_the_curl_commands(page: Page, server: Server, tmp_path: Path) -> None:
    """Run in a shell, each command gives the server's answer. A file name may need quoting."""
    name = "it's a cat; $HOME.jpg"
    photo = CAT.read_bytes()
    (tmp_path / name).write_bytes(photo)
    choose(page, photo, name)
    expect_result(page, name, (451, 300))
    page.get_by_text("Request with curl").click()
    for view, file, parameters in (
        ("Mask", "mask.png", {}),
        ("Overlay", "overlay.png", {"view": "overlay", "alpha": "0.5"}),
        ("Cutout", "cutout.png", {"view": "cutout"}),
        ("Confidence", "confidence.png", {"view": "confidence"}),
    ):
        page.get_by_label("Response").select_option(view)
        run_in(tmp_path, page.locator("#curl").inner_text())
        assert (tmp_path / file).read_bytes() == ask(server, photo, **parameters).content
    page.get_by_label("Response").select_option("JSON")
    run_in(tmp_path, page.locator("#curl").inner_text())
    answer = ask(server, photo, "application/json").json()
    assert json.loads((tmp_path / "answer.json").read_bytes())["classes"] == answer["classes"]


def test_the_curl_command_of_a_sample(
    open_page: Callable[..., Page], server: Server, tmp_path: Path
) -> None:
    """The command downloads the sample first. The button copies the whole command."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Cat").click()
    expect_result(page, "cat.jpg", (451, 300))
    page.get_by_text("Request with curl").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    command: str = page.evaluate("() => navigator.clipboard.readText()")
    run_in(tmp_path, command)
    assert (tmp_path / "mask.png").read_bytes() == ask(server, CAT.read_bytes()).content


def test_the_times(result: Page) -> None:
    """Each of the server's stages, in order, then the transfer."""
    result.get_by_text("Time", exact=False).locator("visible=true").first.click()
    expect(result.locator("#times dt")).to_have_text(
        ["Reading", "Resizing", "Waiting", "Network", "Enlarging", "Writing", "Transfer"]
    )
    for value in result.locator("#times dd").all():
        expect(value).to_have_text(re.compile(r"^\d+\.\d m?s$"))
