"""Arrays as pictures: sheets of tiles, PNG files, animations."""

import numpy as np

from sit_jax.drafts import draft
from sit_jax.errors import UserError

DARK = 40  # of the padding: tells a black tile from the sheet


def sheet(images, columns, zoom=None, pad=2):
    """uint8 [N, h, w, C] -> uint8 [.., .., C]: rows of `columns` tiles, C 1 or 3.

    zoom enlarges by repeating pixels; None makes every tile at least 64 pixels wide.
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
    height, width = pad + lines * (h + pad), pad + columns * (w + pad)
    out = np.full((height, width, channels), DARK, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        out[y : y + h, x : x + w] = tile
    return out


def save_png(path, image):
    """Writes uint8 [h, w, 1 or 3]; the file appears whole or not at all."""
    from PIL import Image

    image = np.asarray(image)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    try:
        with draft(path) as name:
            picture.save(name, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def save_gif(path, images, seconds=4.0, rest=1.5):
    """Writes uint8 pictures [h, w, 1 or 3] as an animation that rests at its end."""
    from PIL import Image

    each = [max(int(1000 * seconds / len(images)), 20)] * len(images)
    each[-1] = int(1000 * rest)
    frames = [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in images]
    with draft(path) as name:
        frames[0].save(
            name,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=each,
            loop=0,
        )
