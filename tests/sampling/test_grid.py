"""Rounding to bytes, sheets of tiles, PNG files that appear whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from PIL import Image

from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.models.codec import Pixels, to_uint8
from sit_jax.parallel.mesh import make_mesh
from sit_jax.sampling import outputs
from sit_jax.sampling.grid import DARK, LINE, captions, image_grid, save_png
from sit_jax.trainer.previews import SampleGrid


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_every_level_survives_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)
    x = levels.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(x), levels)
    np.testing.assert_array_equal(jax.jit(to_uint8)(x), levels)


def test_bfloat16_is_scaled_in_float32():
    x = jnp.asarray(np.linspace(-1, 1, 4001), jnp.bfloat16)
    np.testing.assert_array_equal(to_uint8(x), to_uint8(x.astype(jnp.float32)))


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_places_tiles_row_by_row(channels):
    images = noise(5, 2, 3, channels)
    out = image_grid(images, columns=2, zoom=4, pad=3)
    assert out.shape == (3 + 3 * (8 + 3), 3 + 2 * (12 + 3), channels)
    seen = np.zeros(out.shape, bool)
    for i, image in enumerate(images):
        y, x = 3 + i // 2 * 11, 3 + i % 2 * 15
        tile = (slice(y, y + 8), slice(x, x + 12))
        np.testing.assert_array_equal(out[tile], np.kron(image, np.ones((4, 4, 1))))
        seen[tile] = True
    assert (out[~seen] == DARK).all()  # padding, and the empty sixth place


def test_small_tiles_are_enlarged_and_large_ones_left():
    assert image_grid(noise(1, 8, 8, 1), 1).shape == (68, 68, 1)
    assert image_grid(noise(1, 28, 28, 1), 1).shape == (4 + 84, 4 + 84, 1)
    assert image_grid(noise(2, 64, 80, 3), 2).shape == (68, 4 + 2 * 82 - 2, 3)


def test_fewer_images_than_columns_make_a_narrow_sheet():
    assert image_grid(noise(3, 8, 8, 3), 10, zoom=1).shape == (12, 2 + 3 * 10, 3)


def strip(words, width, columns):
    """What is written above the first row of tiles."""
    images = noise(len(words), 64, width, 3)
    out = image_grid(images, columns, captions=words)
    bare = image_grid(images, columns)
    np.testing.assert_array_equal(out[2 + LINE : 2 + LINE + 64], bare[2:66])
    assert out.shape[0] == bare.shape[0] + LINE * -(-len(words) // columns)
    return out[2 : 2 + LINE, 2:, 0]


def test_captions_stand_above_their_tiles_and_do_not_overlap():
    written = strip(["0 cat", "a name much longer than its tile"], 64, 2)
    assert (written[:, :64] != DARK).any() and (written[:, 66:128] != DARK).any()
    # between two names, at the right edge, and below and above the letters
    assert (written[:, 60:66] == DARK).all() and (written[:, 126:] == DARK).all()
    assert (written[0] == DARK).all() and (written[-1] == DARK).all()
    np.testing.assert_array_equal(written[:, :66], strip(["0 cat", "b"], 64, 2)[:, :66])


def test_tiles_of_one_class_share_a_caption():
    name = "a name longer than its tile"
    written = strip([name, name, "b"], 64, 3)
    assert (written[:, 60:70] != DARK).any()  # over both tiles
    assert (strip([name, "b", name], 64, 3)[:, 60:66] == DARK).all()


def test_captions_are_numbers_and_names_where_there_are_names():
    names = {"0": "0", "1": "cat"}
    assert captions([1, 0, 7], names) == ["1 cat", "0", "7"]
    assert captions([0, 1], {"0": "0", "1": "1"}) is None
    assert captions([0], None) is None and captions([0], {}) is None


def test_previews_and_sheets_of_samples_name_the_classes(tmp_path):
    c = small.config(preview=4, shape=(4, 4, 3))
    c.model.classes = 2
    preview = SampleGrid(c, build_experiment(c), make_mesh(), ["cat", "dog"])
    images = np.asarray(Pixels().decode(np.zeros((4, 4, 4, 3), np.float32)))
    preview.draw = lambda params: [images]
    wanted = image_grid(images, 2, captions=["0 cat", "0 cat", "1 dog", "1 dog"])
    np.testing.assert_array_equal(preview(None), wanted)
    labels, names = np.array([0, 0, 1, 1]), {"0": "cat", "1": "dog"}
    outputs.assemble(tmp_path / "x.png", [images], labels, 2, names)
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), wanted)


@pytest.mark.parametrize(
    ("name", "same"),
    [("é", "e"), ("e\u0301", "e"), ("猫", "?"), ("a\nb", "a?b"), ("\udcff", "?")],
)
def test_a_caption_is_one_line_of_what_the_font_has(name, same):
    np.testing.assert_array_equal(strip([name], 64, 1), strip([same], 64, 1))


@pytest.mark.parametrize(
    "images",
    [noise(2, 4, 4, 4), noise(4, 4, 3), np.zeros((2, 4, 4, 3), np.float32)],
)
def test_sheet_refuses_what_is_no_picture(images):
    with pytest.raises(ValueError, match="a sheet is made of uint8"):
        image_grid(images, 2)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_png_holds_the_same_pixels(tmp_path, channels, mode):
    image = noise(7, 5, channels)
    path = tmp_path / "new" / "x.png"
    save_png(path, image)
    save_png(path, image)  # over itself
    with Image.open(path) as read:
        assert read.mode == mode and read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_a_failed_png_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_png(path, noise(4, 4, 1))
    before = path.read_bytes()

    def full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.png: No space left"):
        save_png(path, noise(5, 5, 3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*folder/x\.png"):
        save_png(tmp_path / "folder" / "x.png", noise(4, 4, 1))
