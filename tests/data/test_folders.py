"""Folders of images and CIFAR: which images, which labels, which order."""

import os

import numpy as np
import pytest
from helpers import pictures
from helpers.pictures import pixels, png

from sit_jax.data.folders import AdmFolder, CifarFolder, ImageFolder
from sit_jax.data.images import CorruptImage
from sit_jax.errors import UserError


def write(root, names):
    """Files of these names, each a picture of its own; a / makes folders."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i, 9, 8))
    return root


def listed(source):
    """-> names below the source's folder, in its order."""
    return [os.fsdecode(name) for name in source.names]


def test_image_folder_numbers_classes_and_images_by_name(tmp_path):
    source = ImageFolder(pictures.folder(tmp_path), size=12, flip=False)
    assert (len(source), source.shape, source.classes) == (9, (12, 12, 3), 3)
    assert source.class_names == ["ant", "bee", "cat"] and not source.flip
    assert [int(r["label"]) for r in source] == [0] * 3 + [1] * 3 + [2] * 3
    # image n of class c is pixels(10 * c + n); 16 of 16 rows scaled by 12 / 16
    wanted = pixels(11).astype(int).mean((0, 1))
    mean = source[4]["image"].astype(int).mean((0, 1))
    assert abs(mean - wanted).max() < 4  # its colour; another picture's is 10s away
    assert source.name(4) == str(tmp_path / "bee" / "1.png")


def test_image_folder_sorts_as_torchvision(tmp_path):
    """Class folders by code points, in them folder paths as words, then names."""
    wanted = ["B/1.webp", "b/10.jpg", "b/2.PNG", "b/x/1.jpg", "b/x-y/1.jpg"]
    wanted += ["b/x/y/1.jpg", "é/0.jpeg"]  # for "-" comes before "/"
    source = ImageFolder(write(tmp_path, reversed(wanted)), size=8)
    assert source.class_names == ["B", "b", "é"]
    assert listed(source) == wanted


def test_image_folder_takes_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    source = ImageFolder(write(tmp_path, [f"{name}/0.jpg", "tea/0.jpg"]), size=8)
    assert source.class_names == [name, "tea"] and len(source.listing_sha256()) == 64


def test_image_folder_leaves_out_what_is_no_image(tmp_path):
    names = ["a/0.jpg", "a/notes.txt", "a/.hidden.jpg", ".git/0.jpg", "b/1.bmp"]
    write(tmp_path, names)
    (tmp_path / "readme.jpg").write_bytes(png(0))  # beside the classes
    source = ImageFolder(tmp_path, size=8)
    assert listed(source) == ["a/0.jpg", "b/1.bmp"]
    beside, other = source.remarks
    assert beside.startswith("1 files are left out, as they lie beside the folders")
    assert beside.endswith(f"{tmp_path}/readme.jpg ..")
    assert "do not end in .jpg" in other and f"{tmp_path}/a/notes.txt" in other
    text = write(tmp_path / "other", ["a/0.jpg"])
    (text / "a/1.jpg").write_text("this is no image")
    with pytest.raises(CorruptImage, match=r"a/1\.jpg: not an image"):
        ImageFolder(text, size=8)[1]


def test_image_folder_remarks_a_folder_around_the_classes(tmp_path):
    """As unpacking a zip leaves it: one class, unless its folders are named."""
    write(tmp_path, ["photos/a/0.jpg", "photos/b/1.jpg"])
    (remark,) = ImageFolder(tmp_path, size=8).remarks
    assert remark.endswith(f"name {tmp_path}/photos instead")
    assert not ImageFolder(tmp_path / "photos", size=8).remarks
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"no folder .*photos\.zip; .* unpacked"):
        ImageFolder(tmp_path / "photos.zip", size=8)


def test_image_folder_follows_links_but_not_back_up(tmp_path):
    write(tmp_path, ["a/x/0.jpg"])
    os.symlink(tmp_path / "a", tmp_path / "a" / "x" / "up")
    os.symlink(tmp_path / "a" / "x", tmp_path / "b")  # a class may be a link
    names = listed(ImageFolder(tmp_path, size=8))
    assert [name for name in names if name.startswith("a")] == ["a/x/0.jpg"]
    assert "b/0.jpg" in names


def test_missing_folders_classes_and_images_are_named(tmp_path):
    for kind in (ImageFolder, AdmFolder, CifarFolder):
        with pytest.raises(UserError, match=f"no folder {tmp_path}/none"):
            kind(tmp_path / "none")
    with pytest.raises(UserError, match="holds no folders; .* AdmFolder"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match=f"no images .* below {tmp_path}"):
        AdmFolder(tmp_path)
    write(tmp_path, ["a/0.jpg", "b/c/notes.txt"])
    with pytest.raises(UserError, match=f"no images in {tmp_path}/b; remove it"):
        ImageFolder(tmp_path)


def test_adm_folder_takes_classes_from_names(tmp_path):
    names = ["10_0.jpg", "2_1.gif", "sub/2_0.jpeg", "sub/n01_a_b.PNG", "z_.png"]
    source = AdmFolder(write(tmp_path, [*names, "skipped_0.webp"]), size=8)
    assert source.class_names == ["10", "2", "n01", "z"]  # as words: 10 before 2
    assert listed(source) == names
    assert [int(label) for label in source.labels] == [0, 1, 1, 2, 3]
    write(tmp_path, ["plain.jpg"])
    with pytest.raises(UserError, match=r"plain\.jpg has no class .* ClassID_ImgID"):
        AdmFolder(tmp_path)


def test_adm_folder_sorts_files_and_folders_together(tmp_path):
    names = ["a_0.jpg", "b/a_0.jpg", "b/c/a_0.jpg", "b/d_0.jpg", "c_0.jpg"]
    assert listed(AdmFolder(write(tmp_path, names), size=8)) == names


def test_cifar_folder_has_a_train_and_a_test_set(tmp_path):
    pictures.folder(tmp_path / "train", size=(32, 32))
    pictures.folder(tmp_path / "test", ("ant", "bee", "cat"), 1, (32, 32))
    train, test = CifarFolder(tmp_path), CifarFolder(tmp_path, train=False)
    assert (len(train), len(test), train.shape) == (9, 3, (32, 32, 3))
    np.testing.assert_array_equal(train[5]["image"], pixels(12, 32, 32))  # untouched
    assert train.flip and train.classes == 3
