"""Content negotiation by Accept."""

import pytest

from service.errors import NotAcceptable
from service.http.negotiation import negotiate

AVAILABLE = ("image/png", "image/jpeg", "application/json")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "image/png"),
        ("", "image/png"),
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("application/json", "application/json"),
        ("application/json;charset=utf-8", "application/json"),
        ("application/*", "application/json"),
        ("image/jpeg, application/json", "image/jpeg"),
        ("image/jpeg;q=0.5, application/json", "application/json"),
        ("image/png;q=0.1, */*;q=0.9", "image/jpeg"),
        ("*/*, image/png;q=0", "image/jpeg"),
        ("image/*;q=0.2, application/json;q=0.3", "application/json"),
        ("text/html, image/webp, */*;q=0.8", "image/png"),
        ("image/png;q=nonsense, image/jpeg;q=0.1", "image/jpeg"),
        ("image/jpeg ; q=1.0 , image/png ; q=0.9", "image/jpeg"),
    ],
)
def test_the_best_type_wins(accept: str | None, expected: str) -> None:
    """By quality, then by the service's order; the most specific range gives the quality."""
    assert negotiate(accept, AVAILABLE) == expected


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "image/*;q=0, text/*", "nonsense"])
def test_nothing_acceptable(accept: str) -> None:
    """The error lists the available types."""
    with pytest.raises(NotAcceptable) as caught:
        negotiate(accept, AVAILABLE)
    assert caught.value.available == AVAILABLE
