"""Accessibility: no serious axe violation, all controls in tab order, no horizontal overflow."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Page, ViewportSize, expect

from tests.browser.actions import DESKTOP, PHONE, choose, expect_trouble

axe = Axe()


def assert_nothing_serious(page: Page) -> None:
    """Axe reports no serious or critical violation, and nothing is wider than the screen."""
    found: list[dict[str, Any]] = axe.run(page).response["violations"]
    serious = [
        (one["id"], [node["target"] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_axe(
    open_page: Callable[..., Page], viewport: ViewportSize, scheme: Literal["light", "dark"]
) -> None:
    """The empty page, a result with every section open, and an error."""
    page = open_page(viewport=viewport, color_scheme=scheme)
    assert_nothing_serious(page)
    page.get_by_role("button", name="Astronaut").click()
    page.locator("#result").wait_for()
    page.locator("#legend").get_by_role("button", name="person").click()
    for part in page.locator("summary").all():
        part.click()
    assert_nothing_serious(page)
    choose(page, b"no picture")
    expect_trouble(page, "This file is not a supported picture")
    assert_nothing_serious(page)


def test_axe_with_the_camera(open_page: Callable[..., Page]) -> None:
    """The camera dialog passes axe. Escape closes it and returns the focus to its button."""
    page = open_page(permissions=["camera"])
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_role("button", name="Take the picture")).to_be_focused()
    assert_nothing_serious(page)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Use the camera")).to_be_focused()


def test_tab_reaches_everything_in_order(result: Page) -> None:
    """From the header through picture and panel, in reading order."""
    reached = []
    result.locator(".brand").focus()
    for _ in range(22):
        result.keyboard.press("Tab")
        reached.append(
            result.evaluate(
                "() => document.activeElement.id || document.activeElement.textContent.trim()"
            )
        )
    names = [name.split("  ")[0] for name in reached]
    ids = ["file", "camera", "detail", "stage", "zoom-in", "zoom-out", "zoom-fit"]
    ids += ["opacity", "contours-on", "Mask", "Overlay", "Cutout", "Confidence"]
    assert [name for name in names if name in ids] == ids


def test_a_picture_by_keyboard_alone(page: Page) -> None:
    """Enter on a focused sample segments it, and the page announces the result."""
    page.get_by_role("button", name="Cat").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Done. Found: cat", timeout=60_000)
