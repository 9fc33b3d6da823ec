"""Ranges of numbers: argparse types, and annotations that build() checks.

`parser.add_argument("--steps", type=AtLeast(1))` reads whole numbers from 1 on, and
`steps: Annotated[int, AtLeast(1)]` has the same said of a field of a config. A bound
written as a float (`Between(0.0, 1.0)`) makes it a range of any finite numbers.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from inspect import formatannotation, signature

from sit_jax.errors import UserError

ONLY_FILE = "only a config file can set it"


@dataclasses.dataclass(frozen=True)
class Between:
    """The finite numbers from `least` to `most`; whole ones if `least` is an int."""

    least: float
    most: float = math.inf
    excludes_least: bool = False

    def __contains__(self, value):
        if not math.isfinite(value) or (self.excludes_least and value == self.least):
            return False
        is_kind = not self.is_whole or float(value).is_integer()
        return is_kind and self.least <= value <= self.most

    def __call__(self, text):
        """Returns the number that a word of the command line stands for.

        Raises:
          argparse.ArgumentTypeError: the word is no such number.
        """
        try:
            value = int(text) if self.is_whole else float(text)
        except (ValueError, OverflowError):
            value = math.nan
        if value not in self:
            word = text if math.isfinite(value) else repr(text)
            raise argparse.ArgumentTypeError(f"{word}: {self}")
        return value

    def __str__(self):
        kind = "a whole number" if self.is_whole else "a number"
        if self.most < math.inf:
            start = "above" if self.excludes_least else "from"
            return f"{kind} {start} {_digits(self.least)} to {_digits(self.most)}"
        if self.least == -math.inf:
            return kind
        start = "above" if self.excludes_least else "of at least"
        return f"{kind} {start} {_digits(self.least)}"

    @property
    def is_whole(self):
        return isinstance(self.least, int)


class AtLeast(Between):
    """The finite numbers from `least` on."""

    def __init__(self, least):
        super().__init__(least)


class Above(Between):
    """The numbers larger than `least`, up to `most`."""

    def __init__(self, least, most=math.inf):
        super().__init__(least, most, excludes_least=True)


FINITE = Between(-math.inf)
COUNT = AtLeast(1)
SEED = Between(0, 2**32 - 1)


def check_fields(make, fields):
    """Refuses values that do not fit the annotations of a constructor.

    Args:
      make: the constructor; without annotations it takes anything.
      fields: dict of field names to values. None is always accepted.

    Raises:
      UserError: with the field, its value and what it takes.
    """
    try:
        parameters = signature(make, eval_str=True).parameters
    except (NameError, SyntaxError, TypeError, ValueError):  # any text, or no signature
        return
    for name, value in fields.items():
        hint = parameters[name].annotation if name in parameters else typing.Any
        if value is not None and not _fits(value, hint):
            raise UserError(
                f"{make.__name__}: {name} is {value!r}; it takes {_words(hint)}"
            )


def _fits(value, hint):
    """Whether a value fits an annotation; an unknown kind of annotation fits all."""
    from sit_jax.typing import NamedFunction  # it imports JAX, as sources do not

    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is typing.Annotated:
        ranges = [item for item in hint.__metadata__ if isinstance(item, Between)]
        is_number = hasattr(value, "__float__")  # or a schedule in its place
        is_inside = not is_number or all(value in bounds for bounds in ranges)
        return is_inside and _fits(value, inner[0])
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, item) for item in inner)
    if kind is Callable:
        return callable(value)
    if isinstance(kind, type) and issubclass(kind, NamedFunction):
        return isinstance(value, kind)
    if kind is bool:
        return value in (False, True)
    if kind in (int, float):  # also of numpy and JAX, and a schedule in their place
        if not hasattr(value, "__float__"):
            return callable(value)
        return kind is float or float(value).is_integer()
    if kind is tuple:
        if not isinstance(value, tuple | list):
            return False
        return inner[1:] != (...,) or all(_fits(item, inner[0]) for item in value)
    if kind is types.NoneType:
        return value is None
    return not (kind is str and isinstance(value, int | float | tuple))


def _words(hint):
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is typing.Annotated:
        return " and ".join(str(i) for i in hint.__metadata__ if isinstance(i, Between))
    if kind in (typing.Union, types.UnionType):
        return " or ".join(sorted(map(_words, inner), key="None".__eq__))
    if kind is tuple:
        return "a tuple of numbers" if inner[:1] in ((int,), (float,)) else "a tuple"
    words = {Callable: f"a function ({ONLY_FILE})", types.NoneType: "None", str: "text"}
    words |= {int: "a whole number", float: "a number", bool: "True or False"}
    return words.get(kind) or formatannotation(hint)


def _digits(number):
    return str(number) if isinstance(number, int) else f"{number:g}"
