"""What a field takes, by its constructor's annotations."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sit_jax import fields
from sit_jax.config import build, spec
from sit_jax.errors import UserError


def made(
    rule: Callable | None = None,
    kept: tuple[int, ...] | None = None,
    kind: Literal["a", "b"] | None = None,
    share: float = 0.5,
    text: str = "",
    anything: Any = None,
    unsaid=None,
):
    return rule


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("rule", "x", r"made: rule is 'x'; it takes a function \(only .*\) or None"),
        ("kept", "x", "kept is 'x'; it takes a tuple of numbers or None"),
        ("kept", ("x",), "kept is .'x',.; it takes a tuple"),
        ("kind", "c", "kind is 'c'; it takes 'a' or 'b' or None"),
        ("share", "x", "share is 'x'; it takes a number"),
        ("text", 3, "text is 3; it takes text"),
    ],
)
def test_what_is_no_such_thing_is_refused(name, value, wanted):
    with pytest.raises(UserError, match=wanted):
        fields.check(made, {name: value})


@pytest.mark.parametrize(
    "name, values",
    [
        ("rule", (made, None)),
        ("kept", ((1, 2), [3], (), None)),
        ("kind", ("a", None)),
        ("share", (1, 0.5, np.float32(1), jnp.ones(()), optax.constant_schedule(1))),
        ("anything", ("x", 3)),
        ("unsaid", ("x", 3)),
    ],
)
def test_what_may_be_passes(name, values):
    for value in values:
        fields.check(made, {name: value})


def test_an_annotation_may_be_any_text():
    def own(count: "a number of things" = 1):  # noqa: F722
        return count

    assert build(spec(own, count=3)) == 3


def test_build_asks():
    rate = {"init_value": 1.0, "end_value": 0.0}
    with pytest.raises(UserError, match="linear_schedule: transition_steps is 'x'"):
        build(spec(optax.linear_schedule, **rate, transition_steps="x"))
