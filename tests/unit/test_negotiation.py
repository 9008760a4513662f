"""Content negotiation by Accept."""

import pytest

from service.errors import NotAcceptable
from service.http.negotiation import negotiate

AVAILABLE = ("image/png", "image/jpeg", "application/json")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "image/png"),
        (" , ,", "image/png"),
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
        ("image/png;q=nan, image/jpeg;q=.1", "image/jpeg"),
        ("image/jpeg;q=1., image/png;q=0.999", "image/jpeg"),
        ('image/jpeg;note="a, image/png;q=1", image/png;q=0.5', "image/jpeg"),
        ('image/jpeg;note="a \\" b";q=0.9, image/png;q=0.5', "image/jpeg"),
        ('image/jpeg;note="never closed, image/png', "image/jpeg"),
        ("image/jpg, image/png;q=0.5", "image/jpeg"),
        ("text/html, *; q=.2", "image/png"),
    ],
)
def test_the_best_type_wins(accept: str, expected: str) -> None:
    """By quality, then by the service's order; the most specific range gives the quality."""
    assert negotiate([accept], AVAILABLE) == expected


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "image/*;q=0, text/*", "nonsense"])
def test_nothing_acceptable(accept: str) -> None:
    """The error lists the available types."""
    with pytest.raises(NotAcceptable) as caught:
        negotiate([accept], AVAILABLE)
    assert caught.value.available == AVAILABLE


def test_several_header_lines_are_one_list() -> None:
    """RFC 9110, section 5.3. Without any line, the default is acceptable."""
    assert negotiate(["text/html", "image/jpeg"], AVAILABLE) == "image/jpeg"
    assert negotiate([], AVAILABLE) == "image/png"
