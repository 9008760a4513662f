"""API keys, stored as hashes, rate limits, and the names of this service. No HTTP here."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
from limits import RateLimitItem, parse_many
from limits.storage import Storage
from limits.strategies import FixedWindowRateLimiter

from service.errors import RateLimited, SettingsError

KEY_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Valid names of a key. They appear in the file and in the log."""

MAX_CLIENTS: Final = 65_536
"""Most clients whose requests are counted; beyond that the least recent ones are dropped."""

# So that people, and scanners for leaked secrets, recognise a key.
_KEY_PREFIX: Final = "fcn_"
_KEY_BYTES: Final = 32
_LINE: Final = re.compile(rf"(?P<name>{KEY_NAME.pattern}):(?P<sha256>[0-9a-f]{{64}})")
_LOOK_EVERY_S: Final = 1.0

_log: Any = structlog.get_logger("service.keys")


def new_key(name: str) -> tuple[str, str]:
    """Return a new random key, and its line for the file of keys: ``name:sha256-hex``.

    A fast hash without salt suffices: a key has 256 random bits, so it cannot be guessed. Source:
    NIST SP 800-63B-3, section 5.1.2.2, which requires an approved one-way function for secrets of
    at least 112 bits, and salt and a slow hash only below that.
    """
    key = _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return key, f"{name}:{_digest(key).hex()}"


class ApiKeys:
    """The keys of a file, by their hashes.

    Each line is ``name:sha256-hex``; empty lines and lines that begin with ``#`` are ignored. Two
    keys may share a name, so that a client can change from an old key to a new one. The file is
    read again when it changes; this is checked at most once a second. If it is then unreadable or
    has an invalid line, an error is logged and the old keys stay. At the start the same raises
    `SettingsError`.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = self._look()
        self._names = _read(path)
        self._look_again_at = clock() + _LOOK_EVERY_S

    def name_of(self, key: str) -> str | None:
        """The name of a key, or None if the key is unknown."""
        self._refresh()
        digest = _digest(key)
        name = None
        # Compares all keys, each in constant time, so that timing reveals nothing.
        for known, its_name in self._names.items():
            if hmac.compare_digest(known, digest):
                name = its_name
        return name

    def _refresh(self) -> None:
        now = self._clock()
        if now < self._look_again_at:
            return
        self._look_again_at = now + _LOOK_EVERY_S
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._names = _read(self._path)
        except SettingsError as exc:
            _log.error("API keys not read, the old ones hold", reason=str(exc))
        else:
            _log.info("API keys read", keys=len(self._names))

    def _look(self) -> tuple[int, ...] | None:
        """A value that changes whenever the file does; None if there is no file."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(path: Path) -> Mapping[bytes, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise SettingsError(f"API keys: {path}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"API keys: {path}: not a text file") from exc
    names = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            # Does not quote the line: it may contain a key in plain text.
            raise SettingsError(f"API keys: {path}, line {number}: should be name:sha256-hex")
        names[bytes.fromhex(found["sha256"])] = found["name"]
    return names


def parse_rate_limits(text: str) -> Sequence[RateLimitItem]:
    """Parse ``60/minute``, or several limits: ``5/second;1000/day``. Raises ValueError."""
    items = parse_many(text)
    if any(item.amount < 1 for item in items):
        raise ValueError("a limit below 1 would refuse every request")
    return items


class RateLimits:
    """Limits the requests of each client.

    A window begins with a client's first request. Requests beyond the limit are refused until the
    window ends, so a client may send twice the limit in a short time around that end. Each process
    counts separately.
    """

    def __init__(
        self,
        limits: Sequence[RateLimitItem],
        max_clients: int = MAX_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._windows = FixedWindowRateLimiter(_Windows(max_clients * len(limits), clock))

    def count(self, client: str) -> None:
        """Count a request of ``client``. Raises `RateLimited` if it exceeds a limit."""
        exceeded = [one for one in self._limits if not self._windows.hit(one, client)]
        if exceeded:
            stats = [self._windows.get_window_stats(one, client) for one in exceeded]
            wait_s = max(one.reset_time for one in stats) - self._clock()
            raise RateLimited(f"more than {' and '.join(map(str, exceeded))}", wait_s)


class _Windows(Storage):
    """A storage for `limits` in this process, bounded, on the monotonic clock.

    The library's own storage uses the wall clock, keeps every key within a window, and scans all of
    them from a new thread every few requests.
    """

    STORAGE_SCHEME = None

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        super().__init__()
        self._size = size
        self._clock = clock
        self._windows: OrderedDict[str, tuple[int, float]] = OrderedDict()

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        """No error is wrapped."""
        return ()

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Count in a key's window, starting one if there is none; returns the count."""
        count, ends_at = self._window(key)
        if count == 0:
            ends_at = self._clock() + expiry
        self._windows[key] = count + amount, ends_at
        self._windows.move_to_end(key)
        if len(self._windows) > self._size:
            self._windows.popitem(last=False)
        return count + amount

    def get(self, key: str) -> int:
        """The count of a key's window."""
        return self._window(key)[0]

    def get_expiry(self, key: str) -> float:
        """When a key's window ends."""
        return self._window(key)[1]

    def check(self) -> bool:
        """Always available."""
        return True

    def reset(self) -> int:
        """Forget all."""
        forgotten = len(self._windows)
        self._windows.clear()
        return forgotten

    def clear(self, key: str) -> None:
        """Forget a key."""
        self._windows.pop(key, None)

    def _window(self, key: str) -> tuple[int, float]:
        now = self._clock()
        count, ends_at = self._windows.get(key, (0, now))
        return (count, ends_at) if now < ends_at else (0, now)


class AllowedHosts:
    """The host names that requests may be addressed to.

    ``names``: host names, ``*.example.com`` for all names below one, ``*`` for all. Without them
    any name is allowed, unless ``listens_on`` is a loopback address: then a foreign name belongs to
    a web page that has pointed its own name here, to pass the browser's same-origin policy (DNS
    rebinding). Loopback names and addresses are always allowed, because no foreign page has them.
    ``host``: the setting, which may be a name.
    """

    def __init__(self, names: Sequence[str], host: str, listens_on: str) -> None:
        self._any = "*" in names or not (names or _is_loopback(listens_on))
        names = [_plain(name) for name in (*names, host)]
        self._names = frozenset(names)
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))

    def allow(self, name: str, own_address: str) -> bool:
        """Whether a request may be addressed to ``name``, received at ``own_address``."""
        name = _plain(name)
        return (
            self._any
            or name in self._names
            or name == own_address
            or name.endswith(self._suffixes)
            or _is_loopback(name)
        )


def _plain(name: str) -> str:
    """A name or address in lower case, without an address's brackets and a name's root dot."""
    return name.lower().removesuffix(".").strip("[]")


def _is_loopback(name: str) -> bool:
    """Whether a plain name or address is this machine's own. Source: RFC 6761, section 6.3."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def client_address(host: str | None) -> str:
    """The address that a client's requests are counted by: its IPv4 address, or its IPv6 network.

    A client with one IPv6 address has all 2**64 of its network. Source: RFC 6177, RFC 7421.
    """
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(address), 64), strict=False))
        address = address.ipv4_mapped
    return str(address)
