"""A real server with the default model, and Chromium on its page."""

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
    """The default model on all cores."""
    with (
        serving(DEFAULT_MODEL, threads=2, deadline_s=300, max_bytes=MAX_BYTES) as running,
        drained(running),
    ):
        yield running


# Of the package, not of the session: while it is open, no test can run an event loop of its own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Debian's Chromium with a camera that shows a test picture."""
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
    """A function that opens the page in a fresh profile; its arguments are those of contexts.

    At the end no request has gone to another host, and nothing was complained about.
    """
    contexts: list[BrowserContext] = []
    requests: list[str] = []
    complaints: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        # Chromium notes every answer that is an error; those of /segment and those without a key
        # are the tests' own doing.
        refused = message.text.startswith("Failed to load resource")
        meant = "/segment" in message.location["url"] or "401" in message.text
        if message.type in ("error", "warning") and not (refused and meant):
            complaints.append(message.text)

    def open_page(path: str = "/", **options: Any) -> Page:  # noqa: ANN401 - Playwright's own
        context = browser.new_context(
            base_url=server.url, **{"viewport": DESKTOP, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        # Patience for machines that do other work too; nothing waits longer than it must.
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
    """As in `watched_pages`."""
    with watched_pages(browser, server) as open_page:
        yield open_page


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """The page on a desktop."""
    return open_page()


@pytest.fixture(scope="package")
def astronaut(browser: Browser, server: Server) -> Iterator[Page]:
    """A page that many tests look at; what they do to it, `result` undoes."""
    with watched_pages(browser, server) as open_page:
        page = open_page()
        page.get_by_role("button", name="Astronaut").click()
        page.locator("#result").wait_for()
        yield page


@pytest.fixture
def result(astronaut: Page) -> Page:
    """The astronaut's result, as it came."""
    astronaut.bring_to_front()
    astronaut.context.set_offline(False)
    astronaut.mouse.move(5, 5)
    astronaut.get_by_role("button", name="Show the whole picture").click()
    if astronaut.get_by_role("button", name="Show all").is_visible():
        astronaut.get_by_role("button", name="Show all").click()
    astronaut.get_by_label("Colour strength").fill("50")
    astronaut.get_by_role("switch", name="Contours").check()
    return astronaut
