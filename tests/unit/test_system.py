"""Memory that the allocator returns, on Linux with glibc as in the images."""

import os

from service.system import give_back_freed
from tests.reliability.resources import sample


def test_what_is_free_between_what_is_used_is_given_back() -> None:
    """A closed model's pieces are scattered among pieces still in use."""
    pieces = [bytearray(64 * 1024) for _ in range(2 * 1024)]
    kept = pieces[::16]
    del pieces
    before = sample(os.getpid())
    give_back_freed()
    assert before.rss_mib - sample(os.getpid()).rss_mib > 64
    assert len(kept) == 128
