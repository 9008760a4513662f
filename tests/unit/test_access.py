"""API keys in a file, rate limits, and the names of this service."""

import hashlib
import hmac
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from service.access import (
    AllowedHosts,
    ApiKeys,
    RateLimits,
    client_address,
    new_key,
    parse_rate_limits,
)
from service.errors import RateLimited, SettingsError


@dataclass
class Clock:
    """A monotonic clock that the test sets."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of the file of keys."""
    return tmp_path / "api_keys"


def line(name: str, key: str) -> str:
    """A line as `fcn-segment key` writes it."""
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n"


# ---- keys ----------------------------------------------------------------------------------------


def test_a_new_key_is_random_and_its_line_does_not_tell_it(file: Path) -> None:
    """256 random bits, behind a recognisable prefix."""
    (key, its_line), (other, _) = new_key("alice"), new_key("alice")
    assert key != other
    prefix, _, random = key.partition("_")
    assert prefix == "fcn"
    assert len(random) >= 256 / 6
    assert random not in its_line
    file.write_text(its_line)
    assert ApiKeys(file).name_of(key) == "alice"


def test_keys_are_known_by_their_hashes(file: Path) -> None:
    """Among comments and empty lines; any other text is unknown, a hash included."""
    file.write_text("# ours\n\n" + line("alice", "fcn_a") + "  " + line("bob", "fcn_b") + "\n")
    keys = ApiKeys(file)
    assert (keys.name_of("fcn_a"), keys.name_of("fcn_b")) == ("alice", "bob")
    for wrong in (
        "fcn_c",
        "",
        "alice",
        "fcn_a ",
        "é",
        line("alice", "fcn_a").split(":")[1].strip(),
    ):
        assert keys.name_of(wrong) is None


def test_a_name_may_have_two_keys(file: Path) -> None:
    """So that a client can change keys without an interruption."""
    file.write_text(line("alice", "old") + line("alice", "new"))
    keys = ApiKeys(file)
    assert keys.name_of("old") == keys.name_of("new") == "alice"


def test_a_file_without_keys_lets_nobody_in(file: Path) -> None:
    """An empty file does not disable the check."""
    file.write_text("")
    assert ApiKeys(file).name_of("") is None


def test_every_key_is_compared_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hmac.compare_digest, so that timing reveals nothing."""
    file.write_text("".join(line(name, name) for name in ("a", "b", "c")))
    keys = ApiKeys(file)
    compared = 0
    compare = hmac.compare_digest

    def count(known: bytes, sent: bytes) -> bool:
        nonlocal compared
        compared += 1
        return compare(known, sent)

    monkeypatch.setattr(hmac, "compare_digest", count)
    for number, key in enumerate(("a", "c", "nobody's"), 1):
        keys.name_of(key)
        assert compared == 3 * number


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not a text file"),
        (b"alice:fcn_a_key_put_in_as_it_is\n", "line 1: should be name:sha256-hex"),
        (b"# ours\n" + b"0" * 64, "line 2: should be name:sha256-hex"),
        (b"a b:" + b"0" * 64, "line 1"),
    ],
)
def test_a_file_that_cannot_be_taken_stops_the_start(
    file: Path, content: bytes | None, reason: str
) -> None:
    """The one-line error has the file and the line's number, but no content."""
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=reason) as caught:
        ApiKeys(file)
    assert str(file) in str(caught.value)
    assert "as_it_is" not in str(caught.value)


def test_a_changed_file_is_read_again(file: Path, clock: Clock) -> None:
    """Added keys are valid, deleted ones are not; the file is checked at most once a second."""
    file.write_text(line("alice", "old"))
    keys = ApiKeys(file, clock)
    file.write_text(line("alice", "old") + line("alice", "new"))
    clock.now_s += 0.9
    assert keys.name_of("new") is None
    clock.now_s += 0.2
    assert keys.name_of("new") == keys.name_of("old") == "alice"
    file.write_text(line("alice", "new"))
    clock.now_s += 1.1
    assert (keys.name_of("old"), keys.name_of("new")) == (None, "alice")


def test_a_file_that_takes_anothers_place_is_read(file: Path, clock: Clock) -> None:
    """Even with equal size and time, as after `mv` or an update of a Kubernetes secret."""
    file.write_text(line("alice", "old"))
    keys = ApiKeys(file, clock)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    fresh = file.with_name("fresh")
    fresh.write_text(line("alice", "new"))
    os.utime(fresh, ns=times)
    fresh.replace(file)
    clock.now_s += 1.1
    assert (keys.name_of("old"), keys.name_of("new")) == (None, "alice")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("alice:fcn_as_it_is\n"),
        lambda file: file.write_bytes(b"\xff"),
        lambda file: file.unlink(),
    ],
)
def test_a_broken_file_changes_nothing(
    file: Path, clock: Clock, spoil: Callable[[Path], object]
) -> None:
    """The old keys stay; one error is logged, without the line. A repaired file is read."""
    file.write_text(line("alice", "old"))
    keys = ApiKeys(file, clock)
    spoil(file)
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            clock.now_s += 1.1
            assert keys.name_of("old") == "alice"
    assert [one["log_level"] for one in logged] == ["error"]
    assert "as_it_is" not in str(logged)
    file.write_text(line("bob", "new"))
    clock.now_s += 1.1
    assert (keys.name_of("old"), keys.name_of("new")) == (None, "bob")


# ---- rates ---------------------------------------------------------------------------------------


def passes(rates: RateLimits, client: str) -> bool:
    """Whether a request is admitted."""
    try:
        rates.count(client)
    except RateLimited:
        return False
    return True


def refused_for(rates: RateLimits, client: str) -> float:
    """Seconds after which a refused client may retry."""
    with pytest.raises(RateLimited) as caught:
        rates.count(client)
    return caught.value.retry_after_s


def test_so_many_and_no_more(clock: Clock) -> None:
    """The limit applies to each client separately."""
    rates = RateLimits(parse_rate_limits("3/minute"), clock=clock)
    assert [passes(rates, "a") for _ in range(5)] == [True] * 3 + [False] * 2
    assert passes(rates, "b")


def test_the_wait_is_true(clock: Clock) -> None:
    """A request is refused until `retry_after_s` is over; refused requests do not count."""
    rates = RateLimits(parse_rate_limits("2/minute"), clock=clock)
    rates.count("a")
    clock.now_s += 20
    rates.count("a")
    assert refused_for(rates, "a") == pytest.approx(40)
    clock.now_s += 39.9
    assert refused_for(rates, "a") == pytest.approx(0.1)
    clock.now_s += 0.1
    assert [passes(rates, "a") for _ in range(3)] == [True, True, False]


def test_several_limits_at_once(clock: Clock) -> None:
    """The first limit that is reached refuses; the wait is the longest of those reached."""
    rates = RateLimits(parse_rate_limits("2/second;3/hour"), clock=clock)
    assert [passes(rates, "a") for _ in range(2)] == [True, True]
    clock.now_s += 1
    rates.count("a")
    assert refused_for(rates, "a") == pytest.approx(3599)


def test_the_message_says_which_limit(clock: Clock) -> None:
    """It names the limit that was reached."""
    rates = RateLimits(parse_rate_limits("1/second;9/hour"), clock=clock)
    rates.count("a")
    with pytest.raises(RateLimited, match=r"^more than 1 per 1 second$"):
        rates.count("a")


def test_no_more_clients_are_remembered_than_said(clock: Clock) -> None:
    """The least recent clients are dropped, not those that keep sending."""
    rates = RateLimits(parse_rate_limits("1/hour"), max_clients=3, clock=clock)
    assert passes(rates, "eager")
    for number in range(1000):
        assert passes(rates, f"client {number}")
        assert not passes(rates, "eager")
    assert not passes(rates, "client 999")
    assert passes(rates, "client 997")


def test_the_wall_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump of the wall clock neither admits nor refuses a client."""
    rates = RateLimits(parse_rate_limits("1/hour"))
    rates.count("a")
    there = time.time()
    for jump_s in (-86_400.0, 86_400.0):
        now = there + jump_s
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert 3590 < refused_for(rates, "a") <= 3600
        assert passes(rates, f"b {jump_s}")


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("<script>", "unknown"),
        (None, "unknown"),
    ],
)
def test_what_a_client_is_counted_by(host: str | None, client: str) -> None:
    """By IPv4 address or IPv6 network; clients without an address share one counter."""
    assert client_address(host) == client


# ---- names of this service -----------------------------------------------------------------------

LOOPBACK = ["localhost", "Localhost.", "a.localhost", "127.0.0.1", "127.3.4.5", "::1", "[::1]"]


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_service_on_loopback_has_loopback_names(listens_on: str) -> None:
    """Foreign names are those of pages that have pointed them here."""
    hosts = AllowedHosts((), listens_on, listens_on)
    for name in (*LOOPBACK, "::ffff:127.0.0.1"):
        assert hosts.allow(name, listens_on), name
    for name in ("a.example", "localhost.example", "xlocalhost", "192.0.2.1", "0.0.0.0", "x"):  # noqa: S104
        assert not hosts.allow(name, listens_on), name


@pytest.mark.parametrize("listens_on", ["0.0.0.0", "::", "192.0.2.1"])  # noqa: S104
def test_a_service_on_other_addresses_has_any_name(listens_on: str) -> None:
    """Unless names are configured; its own address and loopback names are always allowed."""
    assert AllowedHosts((), listens_on, listens_on).allow("a.example", "192.0.2.1")
    hosts = AllowedHosts(("a.example", "*.B.example", "2001:db8::1"), listens_on, listens_on)
    for name in (*LOOPBACK, "A.EXAMPLE.", "c.b.example", "d.c.b.example", "[2001:DB8::1]"):
        assert hosts.allow(name, "192.0.2.1"), name
    assert hosts.allow("192.0.2.1", "192.0.2.1")
    for name in ("b.example", "xb.example", "a.example.example", "192.0.2.2", "*"):
        assert not hosts.allow(name, "192.0.2.1"), name


def test_the_name_that_a_service_listens_on() -> None:
    """The setting `host` may be a name, as in /etc/hosts."""
    assert AllowedHosts((), "workstation", "127.0.1.1").allow("Workstation", "127.0.1.1")


def test_all_names() -> None:
    """A star turns the check off."""
    assert AllowedHosts(("*",), "127.0.0.1", "127.0.0.1").allow("a.example", "127.0.0.1")
