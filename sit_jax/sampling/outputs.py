"""What sample.py writes: a sheet, arrays, or a folder of pictures, by the name's end.

Everything appears by rename, so that an output is whole or not there.
"""

import io
import os
import zipfile

import jax
import numpy as np

from sit_jax.errors import UserError
from sit_jax.files import as_path, atomic_write, is_taken, require_writable
from sit_jax.sampling import array_files
from sit_jax.sampling.pictures import captions, save_gif, save_png, sheet

KINDS = (".png", ".npy", ".npz")


def check(path, overwrite):
    """-> place; refuses what exists already and endings that mean nothing."""
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


def wants_pictures(path):
    return path.suffix != ".npy"


def check_codec(path, parts):
    """Refuses, before anything is drawn, pictures of what has no way to them."""
    if wants_pictures(path):
        one = jax.ShapeDtypeStruct((1, *parts.shape), np.float32)
        jax.eval_shape(parts.codec.decode, one)


def is_array(path, array):
    """Whether a .npy holds it, to the byte."""
    try:
        found = array_files.load(path)
    except UserError:
        return False
    return found.dtype == array.dtype and np.array_equal(found, array)


def save_array(path, array):
    with atomic_write(path) as name:
        np.save(name, array)


def assemble(path, parts, count, labels, columns=None, frames=False, names=None):
    """Parts of `count` batches -> the output; memory does not grow with the images.

    .npy: float32 [N, H, W, C] as the sampler returned it; .npz: ADM's arr_0, uint8
    [N, h, w, C], and the labels as arr_1; a folder: one PNG an image; .png: a sheet of
    all of them, with frames a strip of each and all strips' animation as a .gif; names
    {str(label): name} are written on it.
    """
    if path.suffix == ".png":
        images = np.concatenate(list(_all(parts, count)))
        _sheet(path, images, columns, frames, captions(labels, names))
    elif path.suffix == ".npz":
        with (
            atomic_write(path) as name,
            zipfile.ZipFile(name, "w", allowZip64=True) as file,
        ):
            _stream(file, "arr_0.npy", parts, count, len(labels))
            with file.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(labels))
    elif path.suffix == ".npy":
        with atomic_write(path) as name, open(name, "wb") as file:
            for chunk in _npy(parts, count, len(labels)):
                file.write(chunk)
    else:
        _folder(path, parts, count)


def _all(parts, count):
    return (parts.images(batch) for batch in range(count))


def _npy(parts, count, total):
    """The bytes of a .npy file of all parts, one after the other."""
    first = parts.images(0)
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (total, *first.shape[1:]),
    }
    begin = io.BytesIO()
    np.lib.format.write_array_header_1_0(begin, header)
    yield begin.getvalue()
    for images in _all(parts, count):
        yield np.ascontiguousarray(images).tobytes()


def _stream(file, name, parts, count, total):
    with file.open(name, "w", force_zip64=True) as entry:
        for chunk in _npy(parts, count, total):
            entry.write(chunk)


def _folder(path, parts, count):
    for pattern in ("[0-9]*.png", ".[0-9]*.png"):
        for old in path.glob(pattern):  # of more images, or what a kill has left
            old.unlink()
    i = 0
    for images in _all(parts, count):
        for image in images:
            save_png(path / f"{i:06d}.png", image)
            i += 1


def _sheet(path, images, columns, frames, words):
    """images [N, h, w, C], with frames [N, F, h, w, C]; words: N captions or None."""
    if not frames:
        save_png(path, sheet(images, columns, captions=words))
        return
    strips, length = images.reshape(-1, *images.shape[2:]), images.shape[1]
    each = words and [word for word in words for _ in range(length)]
    save_png(path, sheet(strips, length, captions=each))
    states = np.swapaxes(images, 0, 1)
    moving = [sheet(frame, columns, captions=words) for frame in states]
    save_gif(path.with_suffix(".gif"), moving)


def manifest_path(path):
    """Where the record of an output stands: beside a file, inside a folder."""
    if path.suffix in KINDS:
        return path.with_name(f"{path.name}.manifest.json")
    return path / "manifest.json"
