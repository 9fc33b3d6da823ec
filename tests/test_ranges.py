"""Ranges, as types of the command line and as annotations of constructors."""

import argparse
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Union

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sit_jax.config import ROLES, Unavailable, build, from_json, spec
from sit_jax.errors import UserError
from sit_jax.ranges import COUNT, FINITE, SEED, Above, AtLeast, Between, check_fields
from sit_jax.typing import NamedFunction


def make(
    rule: Callable | None = None,
    kept: tuple[int, ...] | None = None,
    share: Annotated[float, Between(0.0, 1.0)] = 0.5,
    rate: Annotated[float, Above(0.0)] | Callable = 0.5,
    steps: Annotated[int, AtLeast(1)] | None = 3,
    text: str = "",
    anything: Any = None,
    bare=None,
):
    return rule


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("rule", "x", r"make: rule is 'x'; it takes a function \(only .*\) or None"),
        ("kept", "x", "kept is 'x'; it takes a tuple of numbers or None"),
        ("kept", ("x",), "kept is .'x',.; it takes a tuple"),
        ("kept", (0.5,), "kept is"),
        ("share", "x", "share is 'x'; it takes a number from 0 to 1"),
        ("share", 1.1, "share is 1.1; it takes a number from 0 to 1"),
        ("rate", 0.0, "rate is 0.0; it takes a number above 0 or a function"),
        ("rate", float("inf"), "rate is inf"),
        ("steps", 0, "steps is 0; it takes a whole number of at least 1 or None"),
        ("steps", 1.5, "steps is 1.5"),
        ("steps", float("nan"), "steps is nan"),
        ("text", 3, "text is 3; it takes text"),
    ],
)
def test_check_fields_refuses(name, value, wanted):
    with pytest.raises(UserError, match=wanted):
        check_fields(make, {name: value})


@pytest.mark.parametrize(
    "name, values",
    [
        ("rule", (make, None)),
        ("kept", ((1, 2), [3], (), None)),
        ("share", (1, 0.5, np.float32(1), jnp.ones(()))),
        ("rate", (1, optax.constant_schedule(1))),
        ("steps", (1, np.int64(2), 4.0)),
        ("anything", ("x", 3)),
        ("bare", ("x", 3)),
        ("absent", (3,)),
    ],
)
def test_check_fields_accepts(name, values):
    for value in values:
        check_fields(make, {name: value})


def test_annotation_may_be_any_text():
    def own(count: "a number of things" = 1):  # noqa: F722
        return count

    assert build(spec(own, count=3)) == 3


def test_build_checks_annotations():
    rate = {"init_value": 1.0, "end_value": 0.0}
    with pytest.raises(UserError, match="linear_schedule: transition_steps is 'x'"):
        build(spec(optax.linear_schedule, **rate, transition_steps="x"))


@pytest.mark.parametrize(
    "bounds, good, bad, words",
    [
        (COUNT, "7", ("x", "1.5", "0", "", "1e99"), "a whole number of at least 1"),
        (SEED, "0", ("-1", str(2**32)), "a whole number from 0 to 4294967295"),
        (FINITE, "-1e3", ("x", "nan", "inf", ""), "a number"),
        (Above(0.0), "0.1", ("0", "-1", "inf"), "a number above 0"),
        (Above(0.0, 1.0), "1", ("0", "1.1"), "a number above 0 to 1"),
        (Between(0.0, 1.0), "0", ("-0.1", "1.1"), "a number from 0 to 1"),
    ],
)
def test_ranges_read_words_of_the_command_line(bounds, good, bad, words):
    assert bounds(good) == float(good)
    for word in bad:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            bounds(word)
        assert str(error.value).removeprefix(f"{word!r}").removeprefix(word) == (
            f": {words}"
        )


# ---- generated from the annotations of all that a config may name ----

WRONG = ("nonsense", -3, 1.5, math.nan, math.inf, ("nonsense",), object())


def constructors():
    """Yields what stored configs may name of ours, and schedules and optimizers."""
    for role, rules in ROLES.items():
        for package in rules.packages:
            if package.startswith("sit_jax."):
                path = importlib.import_module(package).__path__
                for module in pkgutil.iter_modules(path, f"{package}."):
                    yield from in_module(importlib.import_module(module.name), role)
    yield from (optax.adamw, optax.sgd, optax.linear_schedule)
    yield from (optax.warmup_cosine_decay_schedule, optax.cosine_decay_schedule)


def in_module(module, role):
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__
        if is_own and inspect.isclass(value) and not name.startswith("_"):
            node = from_json({role: {"make": {"name": f"{module.__name__}.{name}"}}})
            if not isinstance(node[role].make, Unavailable):
                yield value


def annotated_fields():
    """Returns [(constructor, field, its annotation, wrong values)]."""
    cases = []
    for make in dict.fromkeys(constructors()):
        for name, parameter in inspect.signature(
            make, eval_str=True
        ).parameters.items():
            hint = parameter.annotation
            wrong = [value for value in WRONG if is_wrong(value, hint)]
            if wrong and name not in ("parent", "name"):
                cases.append(
                    pytest.param(make, name, wrong, id=f"{make.__name__}.{name}")
                )
    return cases


def is_wrong(value, hint):
    """Whether no reading of an annotation takes the value; unknown ones take all."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        ranges = [item for item in hint.__metadata__ if isinstance(item, Between)]
        is_number = isinstance(value, int | float)
        is_outside = is_number and any(value not in bounds for bounds in ranges)
        return is_outside or is_wrong(value, inner[0])
    if kind in (Union, UnionType):
        return all(is_wrong(value, item) for item in inner)
    if kind is Callable or (isinstance(kind, type) and issubclass(kind, NamedFunction)):
        return not callable(value)
    if kind is bool:
        return value not in (0, 1)
    if kind is int:
        return not isinstance(value, int)
    if kind is float:
        return not isinstance(value, int | float)
    if kind is tuple:
        return not isinstance(value, tuple) or inner[:1] in ((int,), (float,))
    if kind is str:
        return isinstance(value, int | float | tuple)
    return kind is NoneType


@pytest.mark.parametrize("make, name, wrong", annotated_fields())
def test_wrong_value_of_a_field_is_refused_in_one_line(make, name, wrong):
    others = dict.fromkeys(set(spec(make)) - {"make"})  # None is taken everywhere
    for value in wrong:
        with pytest.raises(UserError) as refused:
            build(spec(make, **{**others, name: value}))
        assert f"{make.__name__}: {name} is " in str(refused.value)
        assert "\n" not in str(refused.value)
