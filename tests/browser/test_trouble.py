"""Errors: the page describes each one and offers a retry where that can help."""

import json

from playwright.sync_api import Page, Route, expect

from tests.artefacts import encode, two_class_photo
from tests.browser.actions import CAT, choose, expect_result, expect_trouble
from tests.browser.conftest import MAX_BYTES


def refuse(route: Route) -> None:
    """Answer as the service does when its queue is full."""
    problem = {"type": "/problems/overloaded", "title": "Overloaded", "detail": "queue is full"}
    route.fulfill(
        status=503,
        content_type="application/problem+json",
        headers={"Retry-After": "1"},
        body=json.dumps(problem),
    )


REFUSED = (
    (b"no picture", "This file is not a supported picture", "JPEG, PNG"),
    (CAT.read_bytes()[:2000], "This picture is damaged", "Try another copy"),
    (bytes(MAX_BYTES + 1), "This file is too large", "1 MB"),
    (b"", "This file is empty", ""),
    (bytes(4 * MAX_BYTES), "This file is too large", "1 MB"),
)
"""File, title of the error, part of its detail."""


def test_pictures_that_are_refused(page: Page) -> None:
    """The page says what is wrong with the file and offers no retry."""
    for data, title, words in REFUSED:
        choose(page, data)
        expect_trouble(page, title)
        expect(page.locator("#error-detail")).to_contain_text(words)
        expect(page.locator("#error-reference")).to_contain_text("Request ")
        expect(page.get_by_role("button", name="Try again")).to_be_hidden()


def test_the_server_cannot_be_reached(page: Page) -> None:
    """The page reports the lost connection. A retry works once the server is back."""
    # Wait for the page's own requests.
    expect(page.locator("#model")).not_to_be_empty()
    expect(page.locator("#known")).not_to_be_empty()
    expect(page.locator("#downloads button")).not_to_have_count(1)
    page.context.set_offline(True)
    choose(page, CAT.read_bytes(), "cat.jpg")
    expect_trouble(page, "The server cannot be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect_result(page, "cat.jpg", (451, 300))


def test_a_busy_server_is_asked_again(page: Page) -> None:
    """The page retries by itself after the seconds of Retry-After."""
    page.route("**/segment?*", refuse, times=1)
    choose(page, CAT.read_bytes(), "cat.jpg")
    expect(page.locator("#phase")).to_have_text("The server is busy. Retrying in 1 s")
    expect_result(page, "cat.jpg", (451, 300))


def test_a_server_that_stays_busy(page: Page) -> None:
    """The page gives up after a few tries and offers a retry."""
    page.route("**/segment?*", refuse)
    choose(page, CAT.read_bytes())
    expect_trouble(page, "The server is busy")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_too_many_requests_for_an_hour(page: Page) -> None:
    """The page does not wait for an hour. It reports the error and offers a retry."""
    problem = {
        "type": "/problems/rate-limited",
        "title": "Too many",
        "detail": "more than 9 per 1 hour",
    }
    page.route(
        "**/segment?*",
        lambda route: route.fulfill(
            status=429, headers={"Retry-After": "3600"}, body=json.dumps(problem)
        ),
    )
    choose(page, CAT.read_bytes())
    expect_trouble(page, "Too many requests")
    expect(page.locator("#error-detail")).to_contain_text(
        "More than 9 per 1 hour. Try again later."
    )
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_an_error_that_is_not_the_services_own(page: Page) -> None:
    """The page shows the status of a proxy's error, not its HTML."""
    page.route("**/segment?*", lambda route: route.fulfill(status=502, body="<h1>Bad</h1>"))
    choose(page, CAT.read_bytes())
    expect_trouble(page, "The server could not answer")
    expect(page.locator("#error-detail")).to_contain_text("502")


def test_cancel(page: Page) -> None:
    """Cancel aborts the request and restores the page."""
    page.route("**/segment?*", lambda route: None)
    with page.expect_event("requestfailed") as failed:
        choose(page, CAT.read_bytes())
        expect(page.get_by_role("progressbar")).to_be_visible()
        expect(page.locator("#preview")).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
    assert "/segment" in failed.value.url
    expect(page.get_by_role("heading", name="See what every pixel shows")).to_be_visible()
    expect(page.get_by_label("Choose a picture", exact=True)).to_be_focused()


def test_another_picture_while_one_is_on_its_way(page: Page) -> None:
    """The page shows only the latest picture."""
    page.route("**/segment?*", lambda route: None, times=1)
    choose(page, CAT.read_bytes(), "first.jpg")
    expect(page.get_by_role("progressbar")).to_be_visible()
    choose(page, encode(two_class_photo()), "second.png", "image/png")
    expect_result(page, "second.png", (96, 64))
