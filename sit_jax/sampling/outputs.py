"""Writes what sample.py makes (a grid, arrays, a folder of PNGs), and reads arrays.

Everything appears by rename, so that an output is whole or not there. Rows of an .npz
member are taken from the zip stream, a few at a time: 50,000 images of 256 pixels are
9.8 GB. Files that end early, hold objects or would have to be unpickled are refused.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.lib import format as npy

from sit_jax.errors import UserError
from sit_jax.experiment import Experiment
from sit_jax.files import as_path, atomic_write, is_taken, require_writable
from sit_jax.sampling.grid import captions, image_grid, save_gif, save_png

KINDS = (".png", ".npy", ".npz")
SMALL = 2**26  # bytes that may be unpacked from anything
TIMES = 100  # as large as it is packed may something larger be; photographs are 1 or 2


def check_output(path: Any, overwrite: bool) -> Path:
    """Returns the path of an output.

    Raises:
        UserError: it exists already, cannot be written, or has an unknown ending.
    """
    is_folder = str(path).endswith(("/", os.sep))
    path = as_path(path)
    if not is_folder and path.suffix not in KINDS:
        raise UserError(
            f"--out {path}: write a name ending in {', '.join(KINDS)}, or a folder/"
        )
    taken = any(path.iterdir()) if is_folder and path.is_dir() else is_taken(path)
    if taken and not overwrite:
        raise UserError(f"--out {path} exists; --overwrite replaces it")
    try:
        require_writable(path / "any" if is_folder else path)
    except UserError as error:
        raise UserError(f"--out {error}") from error
    return path


def wants_pictures(path: Path) -> bool:
    """Returns whether an output is of decoded images, and not of data."""
    return path.suffix != ".npy"


def check_codec(path: Path, experiment: Experiment) -> None:
    """Raises a UserError if pictures are wanted of latents without a VAE."""
    if wants_pictures(path):
        one = jax.ShapeDtypeStruct((1, *experiment.shape), np.float32)
        jax.eval_shape(experiment.codec.decode, one)


def assemble(
    path: Path,
    batches: Iterable[np.ndarray],
    labels: np.ndarray,
    columns: int | None = None,
    names: dict[str, str] | None = None,
) -> None:
    """Writes the output of batches of images; memory does not grow with the images.

    .npy: float32 [n, h, w, c] as the sampler returned it. .npz: ADM's arr_0, uint8
    [n, h, w, c], and the labels as arr_1. A folder: one PNG an image. .png: a grid; of
    trajectories [n, f, h, w, c] a strip each, and an animation beside it.

    Args:
        path: the output.
        batches: images [n, h, w, c] or, for a grid, trajectories.
        labels: of the images.
        columns: tiles in a row of a grid.
        names: {str(label): name}, written on a grid.
    """
    if path.suffix == ".png":
        words = captions(labels, names)
        _write_grid(path, np.concatenate(list(batches)), columns, words)
    elif path.suffix == ".npz":
        with (
            atomic_write(path) as name,
            zipfile.ZipFile(name, "w", allowZip64=True) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                _write_npy(file, batches, len(labels))
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, np.asarray(labels))
    elif path.suffix == ".npy":
        with atomic_write(path) as name, open(name, "wb") as file:
            _write_npy(file, batches, len(labels))
    else:
        for pattern in ("[0-9]*.png", ".[0-9]*.png"):
            for old in path.glob(pattern):  # of more images, or what a kill has left
                old.unlink()
        for i, image in enumerate(image for batch in batches for image in batch):
            save_png(path / f"{i:06d}.png", image)


def _write_npy(file, batches, total):
    """Writes a .npy file of all batches, one after the other."""
    for i, images in enumerate(batches):
        if i == 0:
            shape = (total, *images.shape[1:])
            header = {"descr": images.dtype.str, "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(images).tobytes())


def _write_grid(path, images, columns, words):
    """Writes images [n, h, w, c] or trajectories [n, f, h, w, c], n words on them."""
    if images.ndim == 4:
        save_png(path, image_grid(images, columns, captions=words))
        return
    length, states = images.shape[1], np.swapaxes(images, 0, 1)
    frames = [image_grid(state, columns, captions=words) for state in states]
    save_gif(path.with_suffix(".gif"), frames)  # before what says that it is there
    words = words and [word for word in words for _ in range(length)]
    strips = images.reshape(-1, *images.shape[2:])
    save_png(path, image_grid(strips, length, captions=words))


def manifest_path(path: Path) -> Path:
    """Returns where the manifest of an output is: beside a file, inside a folder."""
    if path.suffix in KINDS:
        return path.with_name(f"{path.name}.manifest.json")
    return path / "manifest.json"


class ArrayFile:
    """An opened .npz; its members by name."""

    def __init__(self, path: Any):
        self.path = as_path(path)
        if not self.path.is_file():
            raise UserError(f"no file at {self.path}")
        with (
            _damage_as_user_error(f"{self.path} is no .npz file, or ends too early"),
            self.path.open("rb") as file,
            zipfile.ZipFile(file) as archive,
        ):
            names = archive.namelist()
        self.names = [name[:-4] for name in names if name.endswith(".npy")]

    def __contains__(self, name):
        return name in self.names

    def member(self, name: str) -> "Member":
        """Returns an array by name; a UserError names what there is instead."""
        if name not in self.names:
            listed = ", ".join(self.names) or "nothing"
            raise UserError(f"{self.path} has no array {name}, only {listed}")
        return Member(self.path, name)

    def array(self, name: str) -> np.ndarray:
        """Returns a small array, whole."""
        member = self.member(name)
        size, packed = math.prod(member.shape) * member.dtype.itemsize, member.packed
        if size > max(SMALL, TIMES * packed):
            raise UserError(
                f"{self.path}: {name} unpacks from {packed} to {size} bytes, too many "
                "to be measurements; save it uncompressed if it is what you want"
            )
        with member.open() as (file, _):
            return npy.read_array(file, allow_pickle=False)


class Member:
    """One array of an .npz: shape, dtype, and its rows in order."""

    def __init__(self, path, name):
        self.path, self.name = path, name
        with self.open() as (file, info):
            self.shape, self.dtype = _read_header(
                file, f"{path}: {name}", info.file_size
            )
            self._start = file.tell()
        self.packed, self._crc = info.compress_size, info.CRC

    def __len__(self):
        return self.shape[0]

    @property
    def identity(self) -> list:
        """CRC-32, dtype and shape: these tell arrays apart without reading them."""
        return [self._crc, str(self.dtype), list(self.shape)]

    def batches(
        self, size: int, numbers: Iterable[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Yields arrays [size, ...] until the end; the last one may be shorter.

        numbers: only these of them, ascending.
        """
        row, count = self.shape[1:], self.shape[0] if self.shape else 1
        row_bytes = math.prod(row) * self.dtype.itemsize
        with self.open() as (file, _):
            for number in range(-(-count // size)) if numbers is None else numbers:
                first = number * size
                shape = (min(size, count - first), *row)
                file.seek(self._start + first * row_bytes)
                data = file.read(shape[0] * row_bytes)
                if len(data) < shape[0] * row_bytes:
                    raise EOFError("it ends too early")
                yield np.frombuffer(data, self.dtype).reshape(shape)

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Any, zipfile.ZipInfo]]:
        """Gives the opened member and its ZipInfo; of a bucket only what is used."""
        name = f"{self.name}.npy"
        with (
            _damage_as_user_error(f"{self.path}: {self.name} is damaged"),
            self.path.open("rb") as file,
            zipfile.ZipFile(file) as archive,
            archive.open(name) as member,
        ):
            yield member, archive.getinfo(name)


def load_npy(path: Any) -> np.ndarray:
    """Reads the array of a .npy file, whole; Python objects are refused."""
    path = as_path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    with (
        _damage_as_user_error(f"{path} is no whole .npy file"),
        path.open("rb") as file,
    ):
        return npy.read_array(file, allow_pickle=False)


def _read_header(file, where, size):
    """Returns shape and dtype of the array in a member of `size` bytes.

    Refuses what would have to be unpickled, and a shape that is not of those bytes.
    """
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject:
        raise UserError(f"{where} holds Python objects, which are not read")
    size -= file.tell()
    wanted = math.prod(shape) * dtype.itemsize
    if size != wanted or min(shape, default=0) < 0:
        raise UserError(
            f"{where} is said to be {dtype} {list(shape)}, {wanted} bytes, but has "
            f"{size}"
        )
    if fortran and len(shape) > 1:
        raise UserError(f"{where} is in Fortran order; save np.ascontiguousarray of it")
    return shape, dtype


@contextlib.contextmanager
def _damage_as_user_error(message):
    """Makes a UserError of damage; what the user may not read stays an OSError."""
    try:
        yield
    except (PermissionError, UserError):
        raise
    except Exception as error:  # zipfile, its codecs and NumPy's parser raise anything
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{message} ({words[:200]})") from error
