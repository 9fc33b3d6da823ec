"""Image files become the RGB that the original scripts see, cut by ADM's rule."""

import io
import os

import numpy as np
import pytest
from helpers import small
from helpers.pictures import encoded, pixels, png
from helpers.recorded import arrays, case
from PIL import Image

from sit_jax.data.images import (
    CorruptImage,
    Images,
    center_crop,
    names_sha256,
    pack_names,
    to_rgb,
)


def as_array(data):
    image = to_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("i", range(7))
def test_crop_is_bit_equal_to_the_original(i):
    recorded = arrays("center_crop")
    image = Image.fromarray(recorded[f"in{i}"])
    cropped = center_crop(image, case("center_crop")["size"])
    assert cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, recorded[f"out{i}"])


def test_colours_stay_as_they_are():
    for kind, settings in {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}}.items():
        file = encoded(pixels(0), kind, **settings)
        np.testing.assert_array_equal(as_array(file), pixels(0))
    # JPEG loses something: at quality 95 and without subsampling a few levels
    jpeg = as_array(encoded(pixels(0), "JPEG", quality=95, subsampling=0)).astype(int)
    assert abs(jpeg - pixels(0)).max() < 16


@pytest.mark.parametrize(
    "transparency", [None, 2, b"\0\x80\xff"], ids=["no", "one", "each"]
)
def test_palettes_are_looked_up(transparency):
    indices = np.arange(20, dtype=np.uint8).reshape(4, 5) % 3
    colours = np.array([[9, 200, 30], [255, 0, 128], [1, 2, 3]], np.uint8)
    image = Image.new("P", (5, 4))
    image.frombytes(indices.tobytes())
    image.putpalette(colours.tobytes())
    settings = {} if transparency is None else {"transparency": transparency}
    # and PIL's warning about transparency would be an error here
    rgb = as_array(encoded(image, **settings))
    np.testing.assert_array_equal(rgb, colours[indices])


def test_sixteen_bits_of_grey_are_cut_off_at_255():
    values = np.linspace(0, 65535, 30).astype(np.uint16).reshape(5, 6)
    wanted = np.repeat(np.minimum(values, 255)[..., None], 3, -1)
    np.testing.assert_array_equal(as_array(encoded(values)), wanted)


def test_exif_does_not_turn_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, says the camera
    turned = encoded(pixels(3), "JPEG", exif=exif)
    assert to_rgb(turned).size == (20, 16)
    plain = as_array(encoded(pixels(3), "JPEG"))
    np.testing.assert_array_equal(as_array(turned), plain)


def test_to_rgb_is_what_torchvision_sees():
    """torchvision's loader is open and convert("RGB"); for files of all these kinds."""
    image = Image.fromarray(pixels(4))
    grey = pixels(4)[..., :1]
    np.testing.assert_array_equal(as_array(grey), np.repeat(grey, 3, -1))  # an array
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        data = encoded(image.convert(mode), "TIFF")
        wanted = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(as_array(data), np.asarray(wanted))


@pytest.mark.parametrize(
    "data",
    [b"", b"no image at all", png(0)[:-30], png(0)[:60], encoded(pixels(0), "PCX")],
    ids=["empty", "text", "truncated", "header", "unusual"],
)
def test_broken_images_say_why(data):
    with pytest.raises(CorruptImage) as caught:
        to_rgb(data)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_to_rgb_keeps_the_limit_against_bombs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 16 - 1)
    with pytest.raises(CorruptImage, match="pixels|limit"):
        to_rgb(png(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 16)
    strip = to_rgb(encoded(pixels(0, 300, 1)))  # small, and 24 x 7200 after scaling
    with pytest.raises(CorruptImage, match="7200 x 24 .* limit of 320 pixels"):
        center_crop(strip, 24)


class Listed(Images):
    """Images whose bytes are in memory."""

    def __init__(self, files, labels, class_names):
        super().__init__(size=12)
        self.set_images([f"{i}.png" for i in range(len(files))], labels, class_names)
        self.files = files

    def read(self, i):
        return self.files[i], self.labels[i]

    def name(self, i):
        return f"{i}.png"


def test_records_and_their_mirror_images():
    source = Listed([png(0), png(1)], [1, 0], ["a", "b"])
    assert (len(source), source.shape, source.classes) == (2, (12, 12, 3), 2)
    record, flipped = source[0], source.flipped(0)
    wanted = center_crop(Image.fromarray(pixels(0)), 12)
    np.testing.assert_array_equal(record["image"], wanted)
    np.testing.assert_array_equal(flipped["image"], wanted[:, ::-1])
    assert record["label"] == flipped["label"] == 1
    assert record["image"].dtype == np.uint8 and record["label"].dtype == np.int32
    assert [int(r["label"]) for r in source] == [1, 0]  # a sequence: it ends
    with pytest.raises(CorruptImage, match=r"^0\.png: not an image"):
        Listed([b"?"], [0], ["a"])[0]


def test_listings_tell_sources_apart():
    make = lambda *arguments: Listed(*arguments).listing_sha256()
    same = make([b""] * 2, [0, 1], ["a", "b"])
    # recorded with version 0.1: caches hold it
    assert same == "dbd80af3e61d5f4d5c6279620d5c20c2867727d6e8e47aef4502e1da0f867dd4"
    others = {make([b""] * 2, [1, 0], ["a", "b"]), make([b""] * 2, [0, 1], ["a", "c"])}
    others |= {make([b""] * 3, [0, 1, 1], ["a", "b"])}
    assert len(others | {same}) == 4


def test_names_of_any_words_have_a_sha256():
    words = ["a", "über/straße", "x" * 300, os.fsdecode(b"caf\xe9")]
    names = pack_names(words)
    assert [os.fsdecode(name) for name in names] == words
    one, other = (pack_names(words) for words in (["ab", "c"], ["a", "bc"]))
    assert names_sha256(one) != names_sha256(other)
    recorded = "88e2d1b0ee0dedc27e6d282ec21a8f2c615d05d21974f9643aebec127a5866fb"
    assert names_sha256(names) == recorded  # with version 0.1


TIFF = """
import struct
from sit_jax.data.images import CorruptImage, to_rgb
tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 768, 278: 1, 279: 1}
entries = b"".join(struct.pack("<HHII", tag, 3, 1, n) for tag, n in tags.items())
try:
    to_rgb(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4))
except CorruptImage as error:
    print(error)
"""


def test_to_rgb_silences_what_pillow_logs():
    done = small.script("-c", TIFF)
    assert done.stdout and not done.stderr
