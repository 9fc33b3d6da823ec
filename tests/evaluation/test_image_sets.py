"""Arrays in .npz files and folders of images, read in parts; and what is refused."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from sit_jax.errors import UserError
from sit_jax.evaluation.image_sets import FolderImages, NpzImages
from sit_jax.sampling.outputs import ArrayFile

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3)).astype(np.uint8)


def npz(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def open_images(path):
    return FolderImages(path) if path.is_dir() else NpzImages(ArrayFile(path))


def folder(path, images=PIXELS, ending=".png"):
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}{ending}")
    return path


def read(images, size):
    assert images.shape == (4, 5, 3)
    parts = list(images.batches(size))
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert len(images) == sum(map(len, parts))
    return np.concatenate(parts)


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_an_npz_is_read_in_parts(tmp_path, compressed, size):
    labels = np.arange(7)
    path = npz(tmp_path / "x.npz", compressed, arr_0=PIXELS, arr_1=labels)
    np.testing.assert_array_equal(read(open_images(path), size), PIXELS)


@pytest.mark.parametrize("size", [2, 7])
def test_a_folder_and_those_below_are_read_by_name(tmp_path, size):
    path = folder(tmp_path / "x" / "a", PIXELS[:3]).parent
    folder(path / "b", PIXELS[3:])
    (path / "manifest.json").write_text("{}")
    np.testing.assert_array_equal(read(open_images(path), size), PIXELS)


def test_grey_images_are_three_equal_channels(tmp_path):
    grey = PIXELS[..., :1]
    want = np.broadcast_to(grey, PIXELS.shape)
    np.testing.assert_array_equal(
        read(open_images(npz(tmp_path / "x.npz", arr_0=grey)), 3), want
    )
    path = folder(tmp_path / "x", grey[..., 0])
    np.testing.assert_array_equal(read(open_images(path), 3), want)


def test_an_npz_is_never_held_whole(tmp_path):
    """98 MB of zeros, of which a batch is read."""
    import tracemalloc

    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False}
            shape = {"shape": (500, 256, 256, 3)}
            np.lib.format.write_array_header_1_0(entry, header | shape)
            for _ in range(10):
                entry.write(bytes(50 * 256 * 256 * 3))
    images = open_images(path)
    tracemalloc.start()
    first = next(images.batches(50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == 500 and first.shape == (50, 256, 256, 3)
    assert peak < 3 * first.nbytes


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": PIXELS}, r"has no arr_0, only images; save images as"),
        (
            {"arr_0": np.moveaxis(PIXELS, -1, 1)},
            r"arr_0 is uint8 \[7, 3, 4, 5\], channels first; transpose to NHWC",
        ),
        (
            {"arr_0": PIXELS[0]},
            r"arr_0 is uint8 \[4, 5, 3\]; images are \[N, H, W, 3\]",
        ),
        ({"arr_0": PIXELS[:0]}, r"images are \[N, H, W, 3\]"),
        ({"arr_0": np.asfortranarray(PIXELS)}, "is in Fortran order"),
    ],
    ids=["name", "chw", "one", "none", "fortran"],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, message):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        open_images(path)
    assert "\n" not in str(error.value)


def test_what_is_not_there_or_no_npz_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file at .*x.npz"):
        open_images(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"text")
    with pytest.raises(UserError, match="is no .npz file, or ends too early"):
        open_images(tmp_path / "x.npz")
    (tmp_path / "y").mkdir()
    with pytest.raises(UserError, match="y holds no images"):
        open_images(tmp_path / "y")


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
def test_an_npz_damaged_inside_is_refused_where_it_is(tmp_path, compressed):
    path = npz(tmp_path / "x.npz", compressed, arr_0=PIXELS)
    data = bytearray(path.read_bytes())
    data[300] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match="arr_0 is damaged"):
        list(open_images(path).batches(2))


def test_mixed_sizes_are_refused_with_their_names(tmp_path):
    path = folder(tmp_path / "x")
    Image.fromarray(PIXELS[0, :, :4]).save(path / "odd.png")
    with pytest.raises(
        UserError, match="000000.png is 5 x 4, odd.png is 4 x 4; crop them"
    ):
        FolderImages(path)


def test_a_broken_image_is_named(tmp_path):
    path = folder(tmp_path / "x")
    whole = (path / "000003.png").read_bytes()
    (path / "000003.png").write_bytes(whole[:-40])
    with pytest.raises(UserError, match="000003.png cannot be read as an image"):
        list(FolderImages(path).batches(4))
    (path / "000003.png").write_bytes(b"")
    with pytest.raises(UserError, match="000003.png cannot be read as an image"):
        FolderImages(path)
