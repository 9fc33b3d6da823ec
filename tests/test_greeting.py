"""What processes say of themselves as they meet: versions, arguments, programs."""

import json

import pytest

from sit_jax import greeting
from sit_jax.errors import UserError


@pytest.mark.parametrize(
    "part, value, says",
    [
        ("versions", {"jax": "0.9.0"}, "jax 0.9.0, not 0.10.2"),
        ("settings", {"XLA_FLAGS": "--a"}, "XLA_FLAGS --a, not nothing"),
        ("arguments", ["--seed=2"], "started with '--seed=2', not with '--seed=1'"),
    ],
)
def test_version_skew_and_other_arguments_are_named(part, value, says):
    one = {
        "host": "a",
        "versions": {"jax": "0.10.2"},
        "settings": {"XLA_FLAGS": ""},
        "arguments": ["--seed=1"],
    }
    greeting.require_alike([one, one, one])
    with pytest.raises(UserError) as refused:
        greeting.require_alike([one, one, {**one, "host": "c", part: value}])
    assert str(refused.value) == f"process 2 (c) is not like process 0 (a): {says}"


def test_a_greeting_tells_what_decides_a_program(monkeypatch):
    said = greeting.hello()
    assert {"jax", "jaxlib", "flax", "python", "sit_jax"} <= set(said["versions"])
    assert len(said["versions"]["sit_jax"]) == 12 and said["host"]
    json.dumps(said)
    words = ["--a", "1", "--process", "3", "--processes=4", "--coordinator", "x", "b"]
    assert greeting.arguments(words) == ["--a", "1", "b"]
