"""Image files as the original scripts see them, and records made of them.

What torchvision's ImageFolder hands to SiT's and DiT's train.py is PIL's
convert("RGB"): grey repeated, alpha dropped, palettes looked up, CMYK without a colour
profile, 16 bits of a colour cut to 8, 16 bits of grey cut off at 255. EXIF is not
looked at there, so a photograph that says "turn me" stays as it lies; so it does here.
"""

import dataclasses
import functools
import hashlib
import io
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from sit_jax.data.sources import DataSource
from sit_jax.errors import UserError, hush
from sit_jax.ranges import COUNT, Between

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
CROP = "ADM centre crop"  # the rule's name in the metadata of caches


class CorruptImage(UserError):
    """An image that cannot be decoded; its message begins with the image's name."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Images(DataSource):
    """Image files with labels as records, uint8 [size, size, 3].

    A subclass finds its images in __post_init__, calls set_images(), and reads them.

    Attributes:
      size: pixels of a side after the centre crop.
      flip: whether batches mirror half of the images.
      max_corrupt_fraction: if a larger part of the images cannot be decoded, it ends.
    """

    size: Annotated[int, COUNT] = 256
    flip: bool = True
    max_corrupt_fraction: Annotated[float, Between(0.0, 1.0)] = 0.001

    @abstractmethod
    def read(self, i: int) -> tuple[bytes | np.ndarray, int]:
        """Returns the bytes (or decoded pixels) of image i, and its label."""

    def set_images(
        self, names: Iterable[str], labels: Sequence[int], class_names: Sequence[str]
    ) -> None:
        """Sets the name and the class of each image, and the names of the classes."""
        self.names, self.labels = pack_names(names), np.asarray(labels, np.int32)
        self.class_names, self.classes = list(class_names), len(class_names)
        self.shape = (self.size, self.size, 3)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            data, label = self.read(i)
            image = center_crop(to_rgb(data), self.size)
        except (CorruptImage, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CorruptImage(f"{self.name(i)}: {reason}") from error
        return {"image": image, "label": np.int32(label)}

    def listing_sha256(self) -> str:
        """Returns the sha256 of the classes and of each image's name and label."""
        names = "\0".join(self.class_names)
        digest = hashlib.sha256(os.fsencode(names))  # they need not be UTF-8
        digest.update(names_sha256(self.names).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def pack_names(names: Iterable[str]) -> np.ndarray:
    """Returns names as an array of bytes: a million paths take tens of megabytes."""
    return np.array([os.fsencode(name) for name in names], bytes)


def names_sha256(names: np.ndarray) -> str:
    """Returns the sha256 of packed names: of the offset where each ends, and of all."""
    words = names.tolist()
    ends = np.cumsum([0, *map(len, words)])
    digest = hashlib.sha256(ends.astype("<i8").tobytes())
    digest.update(b"".join(words))
    return digest.hexdigest()


def to_rgb(data: bytes | UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Decodes an image file, or takes its pixels, as PIL's convert("RGB") sees it.

    Raises:
      CorruptImage: whatever is wrong with it, or if it is of another format or larger
        than PIL's limit of pixels.
    """
    _silence_pillow()
    try:
        if isinstance(data, np.ndarray):
            image = Image.fromarray(data[..., 0] if data.shape[2:] == (1,) else data)
        else:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        _require_small(*image.size)
        # which colour is transparent does not change RGB, but makes PIL warn
        image.info.pop("transparency", None)
        return image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        # PIL's words hold an address in memory, and a cache keeps them
        words = f"not an image in one of {', '.join(FORMATS)}"
        raise CorruptImage(words) from error
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error ..
        words = str(error).splitlines() or [type(error).__name__]
        raise CorruptImage(words[0]) from error


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Scales an image and cuts out its middle, by the rule of ADM, DiT, SiT and MDT.

    Halved with a box filter while the short side is at least twice `size`, brought to
    `size` with a bicubic one, cut in the middle (rounding to the even and down).

    Source: github.com/openai/guided-diffusion, image_datasets.py, center_crop_arr.
    """
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _require_small(width, height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    x, y = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((x, y, x + size, y + size)))


@functools.cache
def _silence_pillow():
    """Keeps Pillow's log off the console, once: what it logs, it also raises."""
    hush("PIL")


def _require_small(width, height):
    """PIL refuses twice as much, and only when opening; a strip can grow in a crop."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise CorruptImage(
            f"{width} x {height} are more than PIL's limit of {limit} pixels"
        )
