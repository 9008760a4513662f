"""Every error of the service has a problem type, or is internal."""

from collections.abc import Iterator

from service import errors
from service.http.problems import DESCRIPTIONS, PROBLEM_TYPES

# These stop the start, or are the service's own fault: 500, and the cause in the log.
NOT_FOR_CALLERS = {
    errors.SegmentError,
    errors.ArtefactError,
    errors.ContractError,
    errors.IntegrityError,
    errors.DeviceUnavailable,
    errors.DeviceMemoryExhausted,
    errors.SettingsError,
    errors.RequestError,
    errors.ImageError,
    errors.RemoteError,
    errors.RemoteLost,
    errors.OutputFailed,
    errors.WorkersUnavailable,
}


def tree(root: type[errors.SegmentError]) -> Iterator[type[errors.SegmentError]]:
    """A class and all its subclasses."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_every_error_is_mapped_or_internal() -> None:
    """Every error has a problem type or is in the list of internal ones."""
    assert set(PROBLEM_TYPES) | NOT_FOR_CALLERS == set(tree(errors.SegmentError))
    assert not set(PROBLEM_TYPES) & NOT_FOR_CALLERS


def test_types_are_distinct_and_statuses_documented() -> None:
    """No two errors share a type; each status has a description for OpenAPI."""
    types = [one.type for one in PROBLEM_TYPES.values()]
    assert len(set(types)) == len(types)
    assert {int(one.status) for one in PROBLEM_TYPES.values()} <= set(DESCRIPTIONS)


def test_the_tree_in_the_docstring_is_complete() -> None:
    """The docstring lists every class."""
    assert errors.__doc__ is not None
    for error in tree(errors.SegmentError):
        assert error.__name__ in errors.__doc__
