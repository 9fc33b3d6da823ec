"""Patterns of a stranger's file: matched whole, and not for ever."""

import time

import pytest

from sit_jax.adapters.weights import full_matches
from sit_jax.errors import UserError


@pytest.mark.parametrize("pattern", ["(a|.)" * 38 + "[bc]", "(a|.)*[bc]"])
def test_slow_pattern_is_refused_in_time(pattern):
    begin = time.monotonic()
    with pytest.raises(UserError, match="takes too long"):
        list(full_matches(pattern, ["a" * 80] * 50, seconds=0.5))
    assert time.monotonic() - begin < 5


def test_pattern_matches_whole():
    assert list(full_matches("a.|b", ["ab", "abc", "b"])) == ["ab", "b"]
    with pytest.raises(UserError, match="no regular expression"):
        list(full_matches("(", ["a"]))
