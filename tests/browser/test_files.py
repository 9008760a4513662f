"""The page's files: cached, with security headers, and from this host only."""

from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.clients import Server, assert_problem


@pytest.mark.parametrize("path", ["/", "/docs", "/static/style.css", "/static/js/main.js"])
def test_an_etag_saves_the_second_transfer(server: Server, path: str) -> None:
    """A browser revalidates a file each time and downloads it once."""
    first = httpx.get(server.url + path)
    assert first.status_code == 200
    assert first.headers["Cache-Control"] == "no-cache"
    second = httpx.get(server.url + path, headers={"If-None-Match": first.headers["ETag"]})
    assert (second.status_code, second.content) == (304, b"")


@pytest.mark.parametrize("path", ["/", "/docs", "/static/js/main.js"])
def test_the_security_headers(server: Server, path: str) -> None:
    """Scripts from this host only, no frames, no content sniffing."""
    headers = httpx.get(server.url + path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert "script-src" not in policy
    assert policy["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/static/nothing.js", "/static/../app.py", "/static/%2e%2e/app.py", "/static/js"]
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    """A missing file, a folder, or a path outside the static folder gets 404."""
    assert_problem(httpx.get(server.url + path), 404, "not-found")


def test_the_docs_work_without_any_other_host(open_page: Callable[..., Page]) -> None:
    """Swagger UI shows the API. `open_page` checks the hosts."""
    page = open_page("/docs")
    expect(page.get_by_role("heading", name="FCN Segment")).to_be_visible()
    expect(page.locator("#operations-segmentation-segment")).to_contain_text("/segment")
    page.locator("#operations-segmentation-segment button").first.click()
    expect(page.get_by_role("button", name="Execute").first).to_be_visible()
