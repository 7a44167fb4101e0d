"""The error tree: drawn as it is, one code per class, one line per error."""

from __future__ import annotations

import pickle
import re

import pytest

from wanfit import errors
from wanfit.errors import (
    BadRequest,
    BadSize,
    DownloadFailed,
    JobsError,
    NoRoom,
    StoreFailed,
    WanfitError,
    WeightsError,
)


def descend(parent: type[WanfitError]) -> list[type[WanfitError]]:
    children = [child for child in parent.__subclasses__() if child.__module__ == errors.__name__]
    return [parent, *(below for child in children for below in descend(child))]


TREE = descend(WanfitError)
LEAVES = [error for error in TREE if len(descend(error)) == 1]


def test_the_module_docstring_draws_the_tree_as_it_is() -> None:
    """Name by name and in order, with the depth of each."""
    assert errors.__doc__ is not None
    drawn = re.findall(r"^ {4}([ │├└─]*)(\w+)", errors.__doc__, flags=re.M)
    assert [(len(indent) // 4, name) for indent, name in drawn] == [
        (len(error.__mro__) - len(WanfitError.__mro__), error.__name__) for error in TREE
    ]


def test_every_class_has_a_code_of_its_own_and_says_when_it_happens() -> None:
    codes = [vars(error)["code"] for error in TREE]  # its own, not its parent's
    assert len(set(codes)) == len(TREE)
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)
    assert all(error.__doc__ for error in TREE)


def test_every_leaf_is_one_of_the_kinds_that_the_edges_map() -> None:
    assert len(LEAVES) >= 12
    kinds = (BadRequest, WeightsError, NoRoom, DownloadFailed, StoreFailed, JobsError)
    assert all(sum(issubclass(leaf, kind) for kind in kinds) == 1 for leaf in LEAVES)


@pytest.mark.parametrize("leaf", LEAVES)
def test_an_error_is_one_line_of_message_and_hint(leaf: type[WanfitError]) -> None:
    assert str(leaf("80 frames is not of the form 4n + 1", hint="Use 81")) == (
        "80 frames is not of the form 4n + 1. Use 81"
    )
    assert str(leaf("There is no file")) == "There is no file"


def test_an_error_keeps_its_parts_on_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(BadSize("too large", hint="Use 128")))
    assert isinstance(error, BadSize)
    assert (error.message, error.hint, str(error)) == ("too large", "Use 128", "too large. Use 128")
