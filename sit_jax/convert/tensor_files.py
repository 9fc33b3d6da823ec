"""Files of tensors, .pt and .safetensors: read without running code, and written.

Opening a file gives names and shapes; a tensor is read when it is asked for.
"""

import abc
import argparse
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sit_jax.errors import UserError
from sit_jax.files import local_path, parse_json

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
SHARDED = ".index.json"  # ends the name of the list of a file in several parts
FLOATS = ("float32", "float16", "bfloat16")  # all exact in float32
INDEX = "relative_position_index"  # ends the names of MDT's integer tables
# A mapped file counts as memory where it has been read, until it is closed: so it is
# opened anew after every so many bytes. XL then converts in 1.5 times its size.
REOPEN_AFTER = 2**26
_SAFETENSORS_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
}


class TensorFile(abc.ABC):
    """An opened file: nested dicts whose leaves are tensors that are not read yet."""

    def __init__(self, path: Path):
        self.path, self._content, self._bytes_read = path, None, 0

    @property
    def paths(self) -> list[Path]:
        """All files that are read."""
        return [self.path]

    def content(self) -> Any:
        """Returns a dict by the tensors' names, or what torch.save was given."""
        if self._content is None:
            self._content, self._bytes_read = self._open(), 0
        return self._content

    def read(self, keys: tuple) -> np.ndarray:
        """Returns the tensor that these keys lead to."""
        array = self._read(keys)
        self._bytes_read += array.nbytes
        if self._bytes_read > REOPEN_AFTER:
            self._content = None
        return array

    def metadata(self) -> dict[str, str]:
        """Returns the texts that a .safetensors holds beside its tensors."""
        return {}

    def is_state_dict(self, value: Any) -> bool:
        """Tells whether a part of content() is a dict of tensors alone."""
        return bool(value)

    @abc.abstractmethod
    def shape_and_dtype(self, keys: tuple) -> tuple[tuple[int, ...], str]:
        """Returns shape and name of the dtype of the tensor that keys lead to."""

    @abc.abstractmethod
    def _open(self) -> Any: ...

    @abc.abstractmethod
    def _read(self, keys: tuple) -> np.ndarray: ...


class StateDict(Mapping[str, np.ndarray]):
    """Names to float32 arrays, each read when it is asked for.

    Attributes:
        shapes: names to shapes.
        dtypes: sorted names of the dtypes in the file. Halves are read as float32, and
            MDT's position tables as int64.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: list[str]


class Tensors(StateDict):
    """The tensors of a file."""

    def __init__(self, file: TensorFile, keys: Mapping[str, tuple]):
        """Checks dtypes and sizes; keys: names to the keys that lead to a tensor."""
        self._file, self._keys = file, dict(keys)
        self.shapes = {}
        dtypes: set[str] = set()
        size = sum(path.stat().st_size for path in file.paths)
        for name, path in self._keys.items():
            shape, dtype = file.shape_and_dtype(path)
            if dtype not in FLOATS and not (dtype == "int64" and name.endswith(INDEX)):
                raise UserError(f"{file.path}: {name} is {dtype}, not {FLOATS[0]}")
            if math.prod(shape) > size:  # a view that repeats one number
                raise UserError(
                    f"{file.path}: {name} is {list(shape)}, but the whole file has "
                    f"{size} bytes; get another one"
                )
            self.shapes[name] = shape
            dtypes.add(dtype)
        self.dtypes = sorted(dtypes)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._file.read(self._keys[name])
        return np.asarray(array, np.int64 if array.dtype.kind == "i" else np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def open_file(path: str | Path) -> TensorFile:
    """Opens a .pt, .pth, .bin or .safetensors, or the .index.json of one in parts.

    Raises:
        UserError: there is no such file, it is damaged, or it would run code.
    """
    path = local_path(path)
    if not path.name.endswith((*SUFFIXES, SHARDED)):
        raise UserError(f"{path} does not end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"no file at {path}")
    if path.name.endswith(SHARDED):
        return _ShardedFile(path)
    return (_SafetensorsFile if path.suffix == ".safetensors" else _PickledFile)(path)


def write(path: str | Path, content: Mapping) -> None:
    """Writes nested dicts of arrays as .pt, or one dict of arrays as .safetensors."""
    import torch
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            arrays = {name: np.ascontiguousarray(a) for name, a in content.items()}
            save_file(arrays, path, metadata={"format": "pt"})
        else:
            torch.save(_to_tensors(content), path)
    except (OSError, RuntimeError, SafetensorError) as error:
        below = error.__context__ if isinstance(error, RuntimeError) else error
        reason = getattr(below, "strerror", None) or _first_sentence(error)
        raise UserError(f"{path.parent}: cannot write, {reason}") from error


class _PickledFile(TensorFile):
    """A file of torch.save; before torch 1.6 it was no zip."""

    def is_state_dict(self, value):
        import torch

        return (
            isinstance(value, Mapping)
            and len(value) > 0
            and all(isinstance(item, torch.Tensor) for item in value.values())
        )

    def shape_and_dtype(self, keys):
        tensor = self._leaf(keys)
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def _leaf(self, keys):
        leaf = self.content()
        for key in keys:
            leaf = leaf[key]
        return leaf

    def _read(self, keys):
        tensor = self._leaf(keys).detach()
        is_bfloat16 = str(tensor.dtype) == "torch.bfloat16"  # which numpy has not
        return (tensor.float() if is_bfloat16 else tensor).numpy()

    def _open(self):
        import torch

        is_zip = zipfile.is_zipfile(self.path)
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the error that follows says it
            try:
                return torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=is_zip
                )
            # The unpickler walks over a stranger's bytes: torch itself gives out
            # UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, TypeError,
            # AttributeError, UnicodeDecodeError, struct.error, OverflowError and more.
            except Exception as error:
                if names := _unsafe_globals(self.path, is_zip, str(error)):
                    raise UserError(
                        f"{self.path} was not read: it would run "
                        f"{', '.join(names)[:200]}; a file of weights must not run code"
                    ) from error
                raise _damage(self.path, error) from error


class _SafetensorsFile(TensorFile):
    def shape_and_dtype(self, keys):
        part = self.content()[keys[0]].get_slice(keys[0])
        dtype = part.get_dtype()
        return tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)

    def metadata(self):
        handle = next(iter(self.content().values()), None)
        return (handle and handle.metadata()) or {}

    def _read(self, keys):
        return self.content()[keys[0]].get_tensor(keys[0])

    def _open(self):
        import ml_dtypes  # noqa: F401  makes numpy know bfloat16
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(self.path, framework="numpy")
        except SafetensorError as error:
            raise _damage(self.path, error) from error
        return dict.fromkeys(handle.keys(), handle)


class _ShardedFile(TensorFile):
    """Several files and the JSON that says which one holds a tensor."""

    @property
    def paths(self):
        shards = {shard.path: shard for shard in self.content().values()}
        return [self.path, *shards]

    def shape_and_dtype(self, keys):
        return self.content()[keys[0]].shape_and_dtype(keys)

    def _read(self, keys):
        return self.content()[keys[0]].read(keys)

    def _open(self):
        try:
            files = parse_json(self.path.read_text())["weight_map"]
            paths = {file: self.path.with_name(file) for file in files.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damage(self.path, error) from error
        if nested := [file for file in paths if file.endswith(SHARDED)]:
            raise UserError(f"{self.path} names {nested[0]}, a list like itself")
        shards = {file: open_file(path) for file, path in paths.items()}
        if missing := [n for n in files if n not in shards[files[n]].content()]:
            raise UserError(f"{self.path}: {missing[0]} is not in its file")
        return {name: shards[file] for name, file in files.items()}


def _unsafe_globals(path, is_zip, message):
    """Returns what a file would import or call, as far as torch tells."""
    import torch

    if not is_zip:
        return re.findall(r"GLOBAL ([\w.]+)", message)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # as above: the same bytes, walked over once more
        return []


def _to_tensors(value):
    import torch

    if isinstance(value, dict):
        return type(value)((key, _to_tensors(item)) for key, item in value.items())
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def _damage(path, error):
    return UserError(
        f"{path} is damaged or no file of weights ({_first_sentence(error)})"
    )


def _first_sentence(error):
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return re.split(r"[\n.]", text or type(error).__name__)[0][:100]
