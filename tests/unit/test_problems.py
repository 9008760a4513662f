"""Every error of the service has its place in HTTP."""

from collections.abc import Iterator

from service import errors
from service.http.problems import DESCRIPTIONS, KINDS

# These stop the start, or are nobody's fault but the service's: 500, and the cause in the log.
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
}


def tree(root: type[errors.SegmentError]) -> Iterator[type[errors.SegmentError]]:
    """A class and all below it."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_every_error_is_mapped_or_internal() -> None:
    """A new error without a status is found here, not by a caller."""
    assert set(KINDS) | NOT_FOR_CALLERS == set(tree(errors.SegmentError))
    assert not set(KINDS) & NOT_FOR_CALLERS


def test_types_are_distinct_and_statuses_documented() -> None:
    """One type, one meaning; each status is described in the OpenAPI page."""
    types = [kind.type for kind in KINDS.values()]
    assert len(set(types)) == len(types)
    assert {int(kind.status) for kind in KINDS.values()} <= set(DESCRIPTIONS)


def test_the_tree_in_the_docstring_is_complete() -> None:
    """The docstring draws every class."""
    assert errors.__doc__ is not None
    for error in tree(errors.SegmentError):
        assert error.__name__ in errors.__doc__
