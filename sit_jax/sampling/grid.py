"""Makes pictures of arrays: grids of tiles, PNG files, animations."""

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sit_jax.errors import UserError
from sit_jax.files import atomic_write

DARK, LIGHT = 40, 220  # padding, which tells a black tile from the sheet; and words
LETTERS, LINE = 12, 16  # pixels: size of the font, height of a line of captions


def image_grid(
    images: UInt8[np.ndarray, "n h w c"],
    columns: int,
    zoom: int | None = None,
    pad: int = 2,
    captions: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "_ _ c"]:
    """Returns one picture with the images as tiles.

    Args:
        images: of 1 or 3 channels.
        columns: tiles in a row.
        zoom: repeats pixels so often; None makes a tile at least 64 pixels wide.
        pad: pixels between tiles.
        captions: a word above each tile; equal neighbours share one.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"a sheet is made of uint8 [N, h, w, 1 or 3], not {images.dtype} "
            f"{list(images.shape)}"
        )
    zoom = zoom or -(-64 // min(images.shape[1:3]))
    tiles = images.repeat(zoom, 1).repeat(zoom, 2)
    n, h, w, channels = tiles.shape
    columns = min(columns, n)
    lines = -(-n // columns)
    above = LINE if captions else 0
    down, across = above + h + pad, w + pad
    out = np.full((pad + lines * down, pad + columns * across, channels), DARK, "u1")
    for i, tile in enumerate(tiles):
        y, x = pad + above + i // columns * down, pad + i % columns * across
        out[y : y + h, x : x + w] = tile
    if captions:
        for row in range(lines):
            words = captions[row * columns : (row + 1) * columns]
            strip = out[row * down + pad : row * down + pad + above, pad:]
            strip[:] = _draw_captions(words, across, strip.shape)
    return out


def captions(labels: Sequence[int], names: dict[str, str] | None) -> list[str] | None:
    """Returns number and name of each label, or None if no class has a name.

    names: {str(label): name}, or None. A name that is the number tells nothing.
    """
    shown = {y: name for y, name in (names or {}).items() if name != y}
    if not shown:
        return None
    return [f"{y} {shown.get(y, '')}".strip() for y in map(str, np.asarray(labels))]


def _draw_captions(words, distance, shape):
    """Returns a strip uint8 [height, width, c] with words `distance` pixels apart."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, channels = shape
    strip = Image.new("L", (width, height), DARK)
    pen, font, x = ImageDraw.Draw(strip), ImageFont.load_default(LETTERS), 0
    for word, same in groupby(words):
        space = len(list(same)) * distance
        # in ASCII, all that Pillow's own font has: é as e, others as ?
        letters = unicodedata.normalize("NFKD", word)
        letters = [c for c in letters if not unicodedata.combining(c)]
        text = "".join(c if c.isascii() and c.isprintable() else "?" for c in letters)
        if font.getlength(text) > space - 6:
            while text and font.getlength(f"{text}..") > space - 6:
                text = text[:-1]
            text += ".."
        pen.text((x + 1, height - 4), text, LIGHT, font, anchor="ls")
        x += space
    return np.asarray(strip)[..., None].repeat(channels, -1)


def save_png(path: Any, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes uint8 [h, w, 1 or 3]; the file appears whole or not at all."""
    from PIL import Image

    image = np.asarray(image)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    try:
        with atomic_write(path) as name:
            picture.save(name, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def save_gif(
    path: Any,
    images: Sequence[UInt8[np.ndarray, "h w c"]],
    seconds: float = 4.0,
    rest: float = 1.5,
) -> None:
    """Writes uint8 pictures [h, w, 1 or 3] as an animation that rests at its end."""
    from PIL import Image

    durations = [max(int(1000 * seconds / len(images)), 20)] * len(images)
    durations[-1] = int(1000 * rest)
    frames = [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in images]
    with atomic_write(path) as name:
        frames[0].save(
            name,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
        )
