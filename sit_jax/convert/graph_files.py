"""The constants of a frozen TensorFlow graph (.pb), read without TensorFlow.

Only what a GraphDef needs of Protocol Buffers' encoding: a message is a sequence of
fields, each a number, a kind and a value. Nothing in the file is run.
"""

import math
from pathlib import Path

import numpy as np

from sit_jax.errors import UserError

FLOAT = 1  # DT_FLOAT
LARGEST = 2**28  # numbers in a constant


def constants(path):
    """-> {node name: float32 array} of the nodes "Const" that hold float32."""
    data, found = memoryview(Path(path).read_bytes()), {}
    try:
        for node in _all(data, 1):  # GraphDef.node
            fields = dict(_scalars(node))
            if bytes(fields.get(2, b"")) == b"Const":  # NodeDef.op
                array = _tensor(node)
                if array is not None:
                    found[bytes(fields[1]).decode()] = array  # NodeDef.name
    except (IndexError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged or no TensorFlow graph") from error
    if not found:
        raise UserError(f"{path} is no TensorFlow graph with float32 constants")
    return found


def _tensor(node):
    """The TensorProto in a NodeDef's attribute "value"; None if it is not float32."""
    for attribute in _all(node, 5):  # map<string, AttrValue>
        entry = dict(_scalars(attribute))
        if bytes(entry[1]) != b"value":
            continue
        for tensor in _all(entry[2], 8):  # AttrValue.tensor
            fields = dict(_scalars(tensor))
            if fields.get(1) != FLOAT:
                return None
            shape = [_size(dim) for part in _all(tensor, 2) for dim in _all(part, 2)]
            content = b"".join(map(bytes, _all(tensor, 4)))  # tensor_content
            content = content or b"".join(map(bytes, _all(tensor, 5)))  # float_val
            values = np.frombuffer(content, "<f4")
            if math.prod(shape) > LARGEST or min(shape, default=0) < 0:
                raise ValueError("no constant of a network")
            if len(values) == 1:  # stands for all of them
                return np.full(shape, values[0])
            if len(values) != math.prod(shape):
                raise ValueError("too few values")
            return values.reshape(shape)
    return None


def _size(dim):
    return dict(_scalars(dim)).get(1, 0)


def _all(message, number):
    """The values of a repeated field."""
    return (value for n, value in _scalars(message) if n == number)


def _scalars(message):
    """Yields (field number, value): an int for a varint, otherwise bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if kind == 0:
            value, at = _varint(message, at)
        else:
            if kind == 2:
                size, at = _varint(message, at)
            if size is None or at + size > len(message):
                raise ValueError(f"field of kind {kind} at {at}")
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message, at):
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
