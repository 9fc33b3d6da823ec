"""Image files as the original scripts see them, and records made of them.

What torchvision's ImageFolder hands to SiT's and DiT's train.py is PIL's
convert("RGB"): grey repeated, alpha dropped, palettes looked up, CMYK without a colour
profile, 16 bits of a colour cut to 8, 16 bits of grey cut off at 255. EXIF is not
looked at there, so a photograph that says "turn me" stays as it lies; so it does here.
"""

import hashlib
import io
import os

import numpy as np

from sit_jax.errors import UserError, hush

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
hush("PIL")
CROP = "ADM centre crop"  # the rule's name in the tags of caches


class BrokenImage(UserError):
    """An image that cannot be decoded; its message begins with the image's name."""


class Images:
    """Image files with labels as records, uint8 [size, size, 3].

    files: a sequence of bytes with .name(i) and .names. Where `flip` is true, batches
    take .mirrored(i) instead of [i] at every second position or so; where more than
    `broken_share` of the images cannot be decoded, they stop.
    """

    def __init__(self, files, labels, class_names, size, flip, broken_share):
        if size < 1:
            raise UserError(f"size={size} must be at least 1")
        if not 0 <= broken_share <= 1:
            raise UserError(f"broken_share={broken_share} must be in [0, 1]")
        self.files, self.labels = files, np.asarray(labels, np.int32)
        self.class_names, self.classes = list(class_names), len(class_names)
        self.shape, self.flip, self.broken_share = (size, size, 3), flip, broken_share

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        try:
            data, label = self.read(i)
            image = center_crop(rgb(data), self.shape[0])
        except BrokenImage as error:
            raise BrokenImage(f"{self.name(i)}: {error}") from error
        return {"image": image, "label": label}

    def read(self, i):
        """-> bytes of image i, its label."""
        label = self.labels[i]  # first: it raises IndexError at the end
        return self.files[i], label

    def mirrored(self, i):
        """Record i, its right side left."""
        record = self[i]
        return record | {"image": record["image"][:, ::-1]}

    def name(self, i):
        return self.files.name(i)

    def listing(self):
        """sha256 of what there is: classes, and each image's name and label."""
        names = "\0".join(self.class_names)
        digest = hashlib.sha256(os.fsencode(names))  # they need not be UTF-8
        digest.update(self.files.names.digest().encode())
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def rgb(data):
    """Bytes of an image file, or an uint8 array of its pixels -> PIL image in RGB."""
    image_module = pillow()
    try:
        if isinstance(data, np.ndarray):
            image = image_module.fromarray(data[..., 0] if _grey(data) else data)
        else:
            image = image_module.open(io.BytesIO(data), formats=FORMATS)
        _require_small(*image.size)
        # which colour is transparent does not change RGB, but makes PIL warn
        image.info.pop("transparency", None)
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error ..
        words = str(error).splitlines() or [type(error).__name__]
        if isinstance(error, image_module.UnidentifiedImageError):
            # PIL's words hold an address in memory, and a cache keeps them
            words = [f"not an image in one of {', '.join(FORMATS)}"]
        raise BrokenImage(words[0]) from error


def center_crop(image, size):
    """PIL image -> uint8 [size, size, 3], by the rule of ADM, DiT, SiT and MDT.

    Halved with a box filter while the short side is at least twice `size`, brought to
    `size` with a bicubic one, cut in the middle (rounding to the even and down).
    """
    resampling = pillow().Resampling
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _require_small(width, height)
    image = image.resize((width, height), resampling.BICUBIC)
    x, y = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((x, y, x + size, y + size)))


def pillow():
    """PIL.Image, once it is needed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("images are decoded by Pillow: pip install pillow") from error
    return Image


def _grey(array):
    return array.ndim == 3 and array.shape[-1] == 1


def _require_small(width, height):
    """PIL refuses twice as much, and only when opening; a strip can grow in a crop."""
    limit = pillow().MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise BrokenImage(
            f"{width} x {height} are more than PIL's limit of {limit} pixels"
        )
