"""What a pickle would do, read from its opcodes; nothing of it is run.

Refused are names that are not those of tensors in plain dicts, and what a reader would
pay for with time or memory: objects that unfold, lengths beyond the file. torch's own
restricted reader comes after this one; it knows more names, some of which (bytearray)
allocate as many bytes as a stranger likes.
"""

import dataclasses
import pickletools
import re
from typing import Any

from sit_jax.errors import UserError

CALLED = {  # by state dicts, by training files, and by both before torch 1.6
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    "argparse.Namespace",
}
NAMED = re.compile(  # storages and dtypes, which are only spoken of
    r"torch(\.cuda|\.storage)?\.([A-Z][A-Za-z]*\d*Storage|b?float\d+|u?int\d+|bool)"
)
MOST = 10**6  # opcodes, and objects in an object: XL's training files have 10**5
DEEPEST = 100  # objects within each other; comparing two recurses in C
GETS = ("GET", "BINGET", "LONG_BINGET")
PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
INTO = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
MAKES = ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ")
MARK = pickletools.markobject
HARMLESS = "a file of weights must not run code"


class Refused(UserError):
    """A pickle that must not be read; the message says what it would do."""


@dataclasses.dataclass(slots=True)
class _Seen:
    """What is known of an object on the stack."""

    size: int = 1  # objects in it, counted as often as they are referred to
    depth: int = 0
    value: Any = None  # of a text or number
    name: str | None = None  # of a class or function
    parts: tuple = ()  # of a tuple


def check(file, most):
    """Reads one pickle up to its end, from a file of at most so many bytes.

    Refused says what it would do; ValueError and others, that it is none.
    """
    stack, memo = [], {}
    for count, (code, argument, _) in enumerate(pickletools.genops(file)):
        if code.name in GETS:
            stack.append(memo[argument])
        elif code.name in PUTS:
            memo[len(memo) if argument is None else argument] = stack[-1]
        else:
            stack += _made(code, argument, _taken(stack, code), most)
        if count > MOST or stack and stack[-1] is not MARK and _is_bomb(stack[-1]):
            raise Refused("it unfolds into more objects than memory may hold")


def _is_bomb(seen):
    return seen.size > MOST or seen.depth > DEEPEST


def _taken(stack, code):
    """Removes what an opcode takes from the stack -> the objects, without marks."""
    count = len(code.stack_before)
    if MARK in code.stack_before:
        last = len(stack) - 1 - stack[::-1].index(MARK)
        count = len(stack) - last + code.stack_before.index(MARK)
    if count > len(stack):
        raise ValueError("the pickle takes more than it has")
    start = len(stack) - count
    taken, stack[start:] = stack[start:], []
    return [each for each in taken if each is not MARK]


def _made(code, argument, taken, most):
    """What an opcode puts on the stack, by pickletools' table -> objects."""
    if code.name in ("GLOBAL", "INST"):
        return [_named(argument.replace(" ", "."))]
    if code.name == "STACK_GLOBAL":
        return [_named(".".join(str(each.value) for each in taken))]
    if code.name in INTO:
        _grow(taken[0], taken[1:])
        return taken[:1]
    if code.name == "DUP":
        return taken * 2
    if code.name in MAKES and taken[0].name not in CALLED:
        raise Refused(f"it would call {taken[0].name or 'what is none'}; {HARMLESS}")
    if code.name.startswith(("PERSID", "EXT")):
        raise Refused(f"it asks for an object of its writer's ({code.name})")
    if code.name == "BINPERSID":
        _require_storage(taken[0].parts, most)
    value = argument if isinstance(argument, str | int) else None
    parts = tuple(taken) if code.name.startswith("TUPLE") else ()
    new = [MARK if kind is MARK else _Seen(value=value) for kind in code.stack_after]
    for each in new:
        if each is not MARK:
            each.parts = parts
            _grow(each, taken)
    return new


def _grow(seen, taken):
    seen.size += sum(each.size for each in taken)
    seen.depth = max([seen.depth, *(each.depth + 1 for each in taken)])


def _named(name):
    if name not in CALLED and not NAMED.fullmatch(name):
        raise Refused(f"it would run {name[:100]}; {HARMLESS}")
    return _Seen(name=name)


def _require_storage(parts, most):
    """torch's only persistent ids: storage, type, key, device, numbers in it, .. ."""
    if len(parts) < 5 or parts[0].value != "storage":
        raise Refused("it asks for an object of its writer's (BINPERSID)")
    count = parts[4].value
    if not isinstance(count, int) or not 0 <= count <= most:
        raise Refused(f"it says that a tensor has {count} numbers, in {most} bytes")
