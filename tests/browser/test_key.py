"""A server that requires an API key: the page asks for the key, then continues."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from service.access import new_key
from tests.artefacts import encode, two_class_photo
from tests.browser.actions import choose, expect_result
from tests.browser.conftest import watched_pages
from tests.browser.test_accessibility import assert_nothing_serious
from tests.clients import Server, drained, serving

PHOTO = encode(two_class_photo())
KEY, LINE = new_key("browser")


@pytest.fixture(scope="module")
def keyed(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model behind a key."""
    file = tmp_path_factory.mktemp("keys") / "api_keys"
    file.write_text(LINE)
    with serving(tiny_artefact, api_keys_file=file) as running, drained(running):
        yield running


@pytest.fixture
def open_page(browser: Browser, keyed: Server) -> Iterator[Callable[..., Page]]:
    """The function of `watched_pages` for this server."""
    with watched_pages(browser, keyed) as open_page:
        yield open_page


def give(page: Page, key: str) -> None:
    """Type a key and press Enter."""
    field = page.get_by_label("This server requires an API key")
    expect(field).to_be_focused()
    field.fill(key)
    field.press("Enter")


def test_the_key_is_asked_for_at_once(page: Page) -> None:
    """The key is a password field, stays in this tab and out of the URL, and unlocks the page."""
    expect(page.locator("#key-input")).to_have_attribute("type", "password")
    assert_nothing_serious(page)
    give(page, KEY)
    expect(page.locator("#model")).to_contain_text("tiny")
    expect(page.locator("#key")).to_be_hidden()
    choose(page, PHOTO, "photo.png", "image/png")
    expect_result(page, "photo.png", (96, 64))
    page.get_by_text("Request with curl").click()
    command = page.locator("#curl").inner_text()
    assert '-H "Authorization: Bearer $FCN_API_KEY"' in command
    assert KEY not in page.content() + page.url
    page.reload()
    expect(page.locator("#model")).to_contain_text("tiny")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_a_wrong_key_is_said_and_asked_for_again(page: Page) -> None:
    """The refused picture is segmented as soon as the key is right."""
    choose(page, PHOTO, "photo.png", "image/png")
    give(page, "fcn_wrong")
    expect(page.locator("#key-detail")).to_have_text("The server does not accept this key.")
    give(page, KEY)
    expect_result(page, "photo.png", (96, 64))
