"""Containers of tensors, .pt and .safetensors: read without running code, and written.

Opening one gives names and shapes; a tensor is read when it is asked for.
"""

import argparse
import errno
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sit_jax.convert import torch_containers
from sit_jax.errors import UserError
from sit_jax.files import local_path

KINDS = (".pt", ".pth", ".bin", ".safetensors")
WINDOW = 2**26  # bytes
FLOATS = ("float32", "float16", "bfloat16")  # all exact in float32
INDEX = "relative_position_index"  # what the names of tables of integers end in


class Tensors(Mapping):
    """Names to float32 arrays, in the order given, each read when it is asked for.

    MDT's tables of positions are int64.
    """

    def __init__(self, opened, places):
        self._opened, self._places = opened, places
        like = {name: opened.like(place) for name, place in places.items()}
        self.shapes = {name: shape for name, (shape, _) in like.items()}
        self.dtypes = sorted({dtype for _, dtype in like.values()})
        size = opened.path.stat().st_size
        for name, (shape, dtype) in like.items():
            if dtype not in FLOATS and not (dtype == "int64" and name.endswith(INDEX)):
                raise UserError(f"{opened.path}: {name} is {dtype}, not {FLOATS[0]}")
            if math.prod(shape) > size:  # a view that repeats one number
                raise UserError(
                    f"{opened.path}: {name} is {list(shape)}, but the whole file has "
                    f"{size} bytes; get another one"
                )

    def __getitem__(self, name):
        found = self._opened.read(self._places[name])
        return np.asarray(found, np.int64 if found.dtype.kind == "i" else np.float32)

    def __iter__(self):
        return iter(self._places)

    def __len__(self):
        return len(self._places)


def open_file(path):
    """-> an object with .content(), the nested dicts of the file, for Tensors."""
    path = local_path(path)
    if path.suffix not in KINDS:
        raise UserError(f"{path} does not end in {', '.join(KINDS)}")
    if not path.is_file():
        raise UserError(f"no file at {path}")
    return (_Safetensors if path.suffix == ".safetensors" else _Pickled)(path)


def write(path, content):
    """Nested dicts of arrays as .pt, one dict of arrays as .pt or .safetensors."""
    path = Path(path)
    save = _save_safetensors if path.suffix == ".safetensors" else _save_pickled
    try:
        with open(path, "wb") as file:
            save(content, file)
    except (OSError, RuntimeError) as error:  # torch puts one on top of the other
        below = error.__context__ if isinstance(error, RuntimeError) else error
        reason = getattr(below, "strerror", None) or _first(error)
        raise UserError(f"{path.parent}: cannot write, {reason}") from error


class _Opened:
    """A file's nested dicts; an item's place in it is the keys that lead there.

    A file is mapped into memory, and what has been read of it counts as memory until it
    is closed: so after every WINDOW bytes it is opened anew.
    """

    def __init__(self, path):
        self.path, self._content, self._read = path, None, 0

    def content(self):
        if self._content is None:
            self._content, self._read = self._open(), 0
        return self._content

    def read(self, place):
        found = self._at(place)
        self._read += found.nbytes
        if self._read > WINDOW:
            self._content = None
        return _numpy(found)


class _Pickled(_Opened):
    _is_zip = None

    def is_state(self, value):
        import torch

        return (
            isinstance(value, Mapping)
            and len(value) > 0
            and all(isinstance(item, torch.Tensor) for item in value.values())
        )

    def like(self, place):
        tensor = self._at(place)
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def _at(self, place):
        found = self.content()
        for key in place:
            found = found[key]
        return found

    def _open(self):
        import torch

        try:
            if self._is_zip is None:  # the first time
                self._is_zip = torch_containers.check(self.path)
            with (
                torch.serialization.safe_globals([argparse.Namespace]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # the error that follows says it
                return torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=self._is_zip
                )
        except UserError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # mapping a file that ends too early
                raise
            raise UserError(_damaged(self.path, "it ends too early")) from error
        except Exception as error:  # random bytes can fail in any way
            raise UserError(_damaged(self.path, error)) from error


class _Safetensors(_Opened):
    def is_state(self, value):
        return bool(value)

    def like(self, place):
        part = self.content()[place[0]].get_slice(place[0])
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
        return tuple(part.get_shape()), names.get(part.get_dtype(), part.get_dtype())

    def _at(self, place):
        return self.content()[place[0]].get_tensor(place[0])

    def _open(self):
        import ml_dtypes  # noqa: F401  makes numpy know bfloat16
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(self.path, framework="numpy")
        except SafetensorError as error:
            raise UserError(_damaged(self.path, error)) from error
        return dict.fromkeys(file.keys(), file)


def _numpy(found):
    if isinstance(found, np.ndarray):
        return found
    found = found.detach()
    return (found.float() if str(found.dtype) == "torch.bfloat16" else found).numpy()


def _save_pickled(content, file):
    import torch

    torch.save(_as_torch(content), file)


def _as_torch(value):
    import torch

    if isinstance(value, dict):
        return type(value)((key, _as_torch(item)) for key, item in value.items())
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def _save_safetensors(state, file):
    """One tensor after the other; the library's own writer first copies them all."""
    header, end = {}, 0
    for name, array in state.items():
        place = [end, end := end + array.nbytes]
        dtype = "I64" if array.dtype.kind == "i" else "F32"
        header[name] = dict(dtype=dtype, shape=array.shape, data_offsets=place)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in state.values():
        little = "<i8" if array.dtype.kind == "i" else "<f4"
        file.write(np.ascontiguousarray(array, little).data)


def _damaged(path, error):
    return f"{path} is damaged or no file of weights ({_first(error)})"


def _first(error):
    text = str(error).strip() or type(error).__name__
    return re.split(r"[\n.]", text)[0][:100]
