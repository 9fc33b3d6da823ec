"""What a constructor's fields take, by its annotations, and what to say of the rest."""

import inspect
import types
import typing
from collections.abc import Callable

from sit_jax.errors import UserError

ONLY_FILE = "only a config file can set it"
REASONS = {  # how absl's words begin: what they mean
    "('Non-boolean argument": "it must be True or False",
    "invalid literal for int()": "it must be a whole number, in digits",
    "could not convert string to float": "it must be a number",
}


def check(make, fields):
    """Refuses a value that is not what make's annotation says; None always passes."""
    for name, hint in _hints(make).items():
        value = fields.get(name)
        if value is not None and not _fits(value, hint):
            wanted = _words(hint)
            raise UserError(f"{make.__name__}: {name} is {value!r}; it takes {wanted}")


def plain(reason):
    """absl's sentence about an argument, in plainer words where there are any."""
    argument, _, why = reason.partition(": ")
    found = (words for start, words in REASONS.items() if why.startswith(start))
    return next((f"{argument}: {words}" for words in found), reason)


def _hints(make):
    """Field -> annotation; of what cannot be read, nothing."""
    try:
        fields = inspect.signature(make, eval_str=True).parameters
    except Exception:  # an annotation may be any text
        return {}
    return {name: field.annotation for name, field in fields.items()}


def _fits(value, hint):
    """Whether it may be that; what is not known here may be anything."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is typing.Literal:
        return value in inner
    if kind is Callable:
        return callable(value)
    if kind in (int, float):
        # numpy's and JAX's too; and a schedule, which one may not have thought of
        return hasattr(value, "__float__") or callable(value)
    if kind is tuple:
        each = inner[:1] if inner[1:] == (...,) else ()
        return isinstance(value, tuple | list) and all(
            _fits(item, hint) for item in value for hint in each
        )
    if kind is types.NoneType:
        return value is None
    return not (kind is str and isinstance(value, int | float | tuple))


def _words(hint):
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(sorted(map(_words, inner), key="None".__eq__))
    if kind is typing.Literal:
        return " or ".join(map(repr, inner))
    if kind is Callable:
        return f"a function ({ONLY_FILE})"
    if kind in (int, float):
        return "a number"
    if kind is tuple:
        return "a tuple of numbers" if inner[:1] in ((int,), (float,)) else "a tuple"
    return {types.NoneType: "None", str: "text"}.get(kind) or inspect.formatannotation(
        hint
    )
