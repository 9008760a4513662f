"""Limits on connections, in total and by address."""

from collections.abc import Callable

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server.connections import Clients, Connection, _overrides
from service.settings import Settings


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (["192.0.2.1", "::ffff:192.0.2.1"], "192.0.2.2"),
        (["2001:db8::1", "2001:db8::ffff:2"], "2001:db8:0:1::1"),
    ],
)
def test_an_address_has_a_quarter(
    make_settings: Callable[..., Settings], same: list[str], other: str
) -> None:
    """In any notation; an IPv6 network is one address. A closed connection frees a place."""
    clients = Clients(make_settings(max_connections=8))
    assert [clients.enter(host) for host in [*same, same[0]]] == [True, True, False]
    assert clients.enter(other)
    clients.leave(same[1])
    assert [clients.enter(same[0]), clients.enter(same[0])] == [True, False]


def test_trusted_proxies_have_all_that_is_left(make_settings: Callable[..., Settings]) -> None:
    """A proxy forwards many clients; the total still limits it."""
    clients = Clients(make_settings(max_connections=4, trusted_proxies="127.0.0.1, 10.0.0.0/8"))
    assert clients.enter("192.0.2.1")
    assert [clients.enter(host) for host in ("10.1.2.3", "10.1.2.3", "10.1.2.3")] == [True] * 3
    assert not clients.enter("10.1.2.3")
    assert not clients.enter("198.51.100.1")
    clients.leave("10.1.2.3")
    assert clients.enter("198.51.100.1")


def test_few_connections_are_still_one_for_each(make_settings: Callable[..., Settings]) -> None:
    """A quarter of two is rounded up to one; clients without an address share one entry."""
    clients = Clients(make_settings(max_connections=2))
    assert [clients.enter(None), clients.enter(None)] == [True, False]


def test_a_uvicorn_without_an_overridden_method_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names the method; without it the guard would silently not run."""
    method = Connection._start_asgi_task
    assert _overrides(method) is method
    monkeypatch.delattr(HttpToolsProtocol, "_start_asgi_task")
    with pytest.raises(ImportError, match=r"uvicorn .* is not supported: .*_start_asgi_task"):
        _overrides(method)
