"""Sets of images that are judged: an .npz read in place, or a folder of files.

A set has a length, a shape [H, W, 3] and `batches(size)`, uint8 [n, H, W, 3] in order,
or of these only the ones wanted. Never all of them are in memory. Its `identity` tells
whether it is still the same set. Grey images count as coloured ones, as in PIL.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from sit_jax.data.images import to_rgb
from sit_jax.errors import UserError
from sit_jax.files import local_path

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
THREADS = 8


class NpzImages:
    """arr_0 of an .npz as ADM's evaluator reads it: uint8 [N, H, W, 3]."""

    def __init__(self, file):
        self.path, self._member = file.path, _checked(file)
        self.shape = (*self._member.shape[1:3], 3)

    def __len__(self):
        return len(self._member)

    @property
    def identity(self):
        return self._member.identity

    def batches(self, size, wanted=None):
        for images in self._member.parts(size, wanted):
            yield np.broadcast_to(images, (*images.shape[:3], 3))


class FolderImages:
    """The images in a folder and below it, by name; all of one size."""

    def __init__(self, path):
        self.path = local_path(path)
        found = (
            each for each in self.path.rglob("*") if each.suffix.lower() in ENDINGS
        )
        self._files = sorted(found)
        if not self._files:
            raise UserError(f"{path} holds no images ({', '.join(ENDINGS)})")
        with ThreadPoolExecutor(THREADS) as pool:
            sizes = list(pool.map(_size, self._files))
        odd = [i for i, size in enumerate(sizes) if size != sizes[0]]
        if odd:
            first, other = (
                f"{self._files[i].name} is {sizes[i][1]} x {sizes[i][0]}"
                for i in (0, odd[0])
            )
            raise UserError(
                f"{path} mixes sizes: {first}, {other}; crop them to one size"
            )
        self.shape = (*sizes[0], 3)

    def __len__(self):
        return len(self._files)

    @property
    def identity(self):
        """Names, sizes and times of change."""
        digest = hashlib.sha256()
        for file in self._files:
            found = file.stat()
            said = (str(file.relative_to(self.path)), found.st_size, found.st_mtime_ns)
            digest.update(repr(said).encode())
        return digest.hexdigest()

    def batches(self, size, wanted=None):
        with ThreadPoolExecutor(THREADS) as pool:
            for start in starts(len(self), size, wanted):
                yield np.stack(
                    list(pool.map(_pixels, self._files[start : start + size]))
                )


def starts(count, size, wanted=None):
    """-> where batches of so many images begin; wanted: only these batches' numbers."""
    numbers = range(-(-count // size)) if wanted is None else wanted
    return [number * size for number in numbers]


def _checked(file):
    """arr_0 as a Member, if it is what ADM's evaluator takes."""
    if "arr_0" not in file:
        held = ", ".join(file.names) or "nothing"
        raise UserError(
            f"{file.path} has no arr_0, only {held}; save images as "
            "np.savez(path, uint8 [N, H, W, 3])"
        )
    member = file.member("arr_0")
    shape, is_said = member.shape, f"{file.path}: arr_0 is {member.dtype}"
    if member.dtype != np.uint8:
        raise UserError(f"{is_said} {list(shape)}; images are uint8, 0 to 255")
    if len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0:
        return member
    if len(shape) == 4 and shape[1] in (1, 3):
        raise UserError(f"{is_said} {list(shape)}, channels first; transpose to NHWC")
    raise UserError(f"{is_said} {list(shape)}; images are [N, H, W, 3]")


def _size(file):
    """(height, width), from the file's beginning."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as error:  # decoders raise anything
        raise UserError(f"{file} cannot be read as an image") from error


def _pixels(file):
    try:
        return np.asarray(to_rgb(file.read_bytes()))
    except UserError as error:
        raise UserError(f"{file} cannot be read as an image ({error})") from error
