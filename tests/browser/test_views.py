"""The views that the page offers: the table of `GET /views`."""

from typing import Any
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Page, Route, expect

from tests.browser.actions import CAT, choose, expect_result

VIEWS: list[dict[str, Any]] = [
    {"name": "mask", "media_types": ["image/png", "application/json"], "parameters": ["classes"]},
    {"name": "edges", "media_types": ["image/webp", "image/png"], "parameters": ["alpha"]},
    {"name": "counts", "media_types": ["application/json"], "parameters": ["classes"]},
]


def show_result(page: Page) -> None:
    """Reload, segment a photo, and open the curl command."""
    page.reload()
    choose(page, CAT.read_bytes())
    expect_result(page, "photo.jpg", (451, 300))
    page.get_by_text("Request with curl").click()


def test_a_view_that_the_page_does_not_know(page: Page) -> None:
    """A new image view gets a button and a curl command, with the parameters that it takes."""
    page.route("**/views", lambda route: route.fulfill(json={"views": VIEWS}))
    show_result(page)
    expect(page.locator("#downloads button")).to_have_text(["Mask", "Edges"])
    expect(page.get_by_label("Response").locator("option")).to_have_text(["Mask", "Edges", "JSON"])
    page.locator("#legend").get_by_role("button").first.click()

    def answer(route: Route) -> None:
        assert route.request.headers["accept"] == "image/webp"
        assert parse_qs(urlsplit(route.request.url).query) == {"view": ["edges"], "alpha": ["0.5"]}
        route.fulfill(body="edges", content_type="image/webp")

    page.route("**/segment?*", answer)
    with page.expect_download() as download:
        page.get_by_role("button", name="Edges", exact=True).click()
    assert download.value.suggested_filename == "photo-edges.webp"
    page.get_by_label("Response").select_option("Edges")
    expect(page.locator("#curl")).to_contain_text("view=edges&alpha=0.5' \\\n  -o edges.webp")


def test_a_server_without_the_table(page: Page) -> None:
    """Without `GET /views` the page offers the mask and JSON, which it has from every result."""
    page.route("**/views", lambda route: route.fulfill(status=404))
    show_result(page)
    expect(page.locator("#downloads button")).to_have_text(["Mask"])
    expect(page.get_by_label("Response").locator("option")).to_have_text(["Mask", "JSON"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Mask", exact=True).click()
    assert download.value.suggested_filename == "photo-mask.png"
