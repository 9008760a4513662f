"""A real server with the default model, and Chromium with its page."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from service.settings import DEFAULT_MODEL
from tests.browser.actions import DESKTOP
from tests.clients import Server, drained, serving

MAX_BYTES = 1_000_000


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """The default model on two threads."""
    with (
        serving(DEFAULT_MODEL, threads=2, deadline_s=300, max_bytes=MAX_BYTES) as running,
        drained(running),
    ):
        yield running


# Scope package, not session: while the browser is open, no test can run its own event loop.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Debian's Chromium with a fake camera."""
    path = shutil.which("chromium")
    assert path, "the browser tests need chromium (Debian: apt-get install chromium)"
    flags = ["--use-fake-device-for-media-stream"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def watched_pages(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """Yield a function that opens the page in a fresh profile. Its options are a context's options.

    At the end no request went to another host, and the console has no errors or warnings.
    """
    contexts: list[BrowserContext] = []
    requests: list[str] = []
    complaints: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        # Chromium reports every error status. Tests cause errors of /segment, a missing /views and
        # requests without a key on purpose.
        refused = message.text.startswith("Failed to load resource")
        intended = message.location["url"].endswith("/views") or (
            "/segment" in message.location["url"] or "401" in message.text
        )
        if message.type in ("error", "warning") and not (refused and intended):
            complaints.append(message.text)

    def open_page(path: str = "/", **options: Any) -> Page:  # noqa: ANN401 - Playwright's own
        context = browser.new_context(
            base_url=server.url, **{"viewport": DESKTOP, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        # Long enough for a busy machine.
        context.set_default_timeout(60_000)
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("console", hear)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    own = (f"{server.url}/", "blob:", "data:")
    assert [url for url in requests if not url.startswith(own)] == []
    assert complaints == []


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """The function of `watched_pages`."""
    with watched_pages(browser, server) as open_page:
        yield open_page


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """The page at desktop size."""
    return open_page()


@pytest.fixture(scope="package")
def astronaut(browser: Browser, server: Server) -> Iterator[Page]:
    """A result that many tests share. The fixture `result` resets it."""
    with watched_pages(browser, server) as open_page:
        page = open_page()
        page.get_by_role("button", name="Astronaut").click()
        page.locator("#result").wait_for()
        yield page


@pytest.fixture
def result(astronaut: Page) -> Page:
    """The astronaut's result in its initial state."""
    astronaut.bring_to_front()
    astronaut.context.set_offline(False)
    astronaut.mouse.move(5, 5)
    astronaut.get_by_role("button", name="Show the whole picture").click()
    if astronaut.get_by_role("button", name="Show all").is_visible():
        astronaut.get_by_role("button", name="Show all").click()
    astronaut.get_by_label("Colour strength").fill("50")
    astronaut.get_by_role("switch", name="Contours").check()
    return astronaut
