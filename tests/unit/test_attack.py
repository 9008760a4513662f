"""The generators of hostile files can be trusted: the same seed makes the same file."""

from tests.attack.images import cases, decode_apart


def test_a_seed_makes_the_same_files_again() -> None:
    """And its files differ from each other and from another seed's."""
    first, again, other = (list(cases(seed, 4)) for seed in (3, 3, 4))
    assert first == again
    assert len({one.data for one in first + other}) == 8


def test_what_a_file_took_is_measured_apart() -> None:
    """In a process that may die; the outcome has its name, its memory and what was announced."""
    for one in cases(5, 3):
        outcome = decode_apart(one, None)
        assert outcome.name == one.name
        assert not outcome.result.startswith("ended")
        assert outcome.peak_bytes <= max(outcome.announced_bytes, 64 << 20)
