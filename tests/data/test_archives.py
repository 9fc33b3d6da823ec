"""Tars read in place, with no trust in what they say, and sets of TFDS."""

import copy as copy_module
import io
import os
import sys
import tarfile
import types

import numpy as np
import pytest
from helpers.pictures import pixels, png

from sit_jax.data.archives import (
    ImageNetTar,
    TarFiles,
    Tfds,
    WebdatasetTars,
    read_members,
)
from sit_jax.data.folders import ImageFolder
from sit_jax.data.images import CorruptImage, center_crop, to_rgb
from sit_jax.errors import UserError

LONG = "folder/" + "x" * 120 + "/" + "y" * 130 + ".jpg"


def tar(files, format=tarfile.GNU_FORMAT, change=lambda member: None):
    """Returns the bytes of a tar of {name: bytes}; change(TarInfo) spoils members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as out:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            change(member)
            out.addfile(member, io.BytesIO(data))
    return file.getvalue()


def imagenet(path, classes=("n02", "n01"), each=3):
    """A tar of tars; image n of the c-th class in order is pixels(10 * c + n)."""
    inner = {}
    for label, name in enumerate(sorted(classes)):
        names = [f"{name}_{i}.JPEG" for i in range(each)]
        files = {name: png(10 * label + i) for i, name in enumerate(names)}
        inner[name] = tar(dict(reversed(files.items())))
    path.write_bytes(tar({f"{name}.tar": inner[name] for name in classes}))
    return path


@pytest.mark.parametrize(
    "format",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_members_are_where_tarfile_says(tmp_path, format):
    files = {"a.jpg": b"1234", "empty": b"", "b/" + "c" * 80 + "/d.png": b"x" * 5000}
    files["über.jpg"] = b"u" * 512
    if format != tarfile.USTAR_FORMAT:  # which has no room for it
        files[LONG] = b"long" * 300
    path = tmp_path / "x.tar"
    path.write_bytes(tar({"inner.tar": tar(files, format)}))
    (inner,) = read_members(path)
    members = list(read_members(path, inner))
    assert [m.name for m in members] == list(files)
    held = TarFiles([path], [0] * len(members), members)
    assert [held[i] for i in range(len(members))] == list(files.values())
    assert held.name(0) == f"{path}:a.jpg"


def test_members_skip_folders_and_need_no_end(tmp_path):
    file, path = io.BytesIO(), tmp_path / "x.tar"
    with tarfile.open(fileobj=file, mode="w") as out:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        out.addfile(tarfile.TarInfo("a/b"), io.BytesIO())
    path.write_bytes(file.getvalue()[:1024])  # without the blocks of zeros
    assert [m.name for m in read_members(path)] == ["a/b"]
    path.write_bytes(b"")
    assert not list(read_members(path))


def renamed(name):
    def change(member):
        member.name = name

    return change


def typed(kind):
    def change(member):
        member.type, member.linkname, member.size = kind, "a", 0

    return change


def claiming(size):
    """A tar whose first header says that its file has this many bytes."""
    data = bytearray(tar({"a.jpg": b"12"}))
    is_short = size < 8**11
    data[124:136] = (
        b"%011o\0" % size if is_short else b"\x80" + size.to_bytes(11, "big")
    )
    total = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % total
    return bytes(data)


def pax(record):
    """A tar with this extended header before its only file."""

    def change(member):
        member.type = tarfile.XHDTYPE if member.name == "header" else tarfile.REGTYPE

    return tar({"header": record, "a.jpg": b"12"}, change=change)


DAMAGED = "no tar, or compressed, damaged or cut short"
WRONG = {
    "above": (tar({"a": b""}, change=renamed("../a.jpg")), "'../a.jpg' .* leads out"),
    "inside": (tar({"a": b""}, change=renamed("b/../../a")), "leads out of the tar"),
    "absolute": (tar({"a": b""}, change=renamed("/etc/a")), "'/etc/a' .* leads out"),
    "windows": (tar({"a": b""}, change=renamed("..\\a")), "leads out of the tar"),
    "symlink": (tar({"a": b""}, change=typed(tarfile.SYMTYPE)), "a link or a device"),
    "hardlink": (tar({"a": b""}, change=typed(tarfile.LNKTYPE)), "a link or a device"),
    "device": (tar({"a": b""}, change=typed(tarfile.CHRTYPE)), "a link or a device"),
    "huge": (claiming(2**27 + 1), "says it has 134217729 bytes, more than 134217728"),
    "giant": (claiming(2**60), f"says it has {2**60} bytes"),
    "short": (claiming(2**20), "has 1048576 bytes, but only 9728 are there"),
    "negative": (claiming(-0o1000), "says it has -|" + DAMAGED),
    "checksum": (tar({"a.jpg": b"12"}).replace(b"a.jpg", b"b.jpg"), DAMAGED),
    "cut": (tar({"a.jpg": b"x" * 2000})[:1300], "only 788 are there; the tar is cut"),
    "header": (tar({"a.jpg": b"x"})[:300], DAMAGED),
    "text": (b"<html>not found</html>" * 40, DAMAGED),
    "later": (tar({"a": b"x"})[:1024] + b"?" * 512, "is damaged at byte 1024"),
    "gzip": (b"\x1f\x8b" + b"\0" * 600, DAMAGED),
    "pax path": (pax(b"16 path=../../x\n"), "leads out of the tar"),
    "pax size": (pax(b"20 size=99999999999\n"), "says it has 99999999999 bytes"),
    "pax length": (pax(b"0 a=b\n"), DAMAGED),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tars_are_refused(tmp_path, case):
    data, says = WRONG[case]
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        list(read_members(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_members_notice_a_tar_that_changed(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar({"a.jpg": b"x" * 700}))
    held = TarFiles([path], [0], list(read_members(path)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptImage, match="ends 212 bytes early"):
        held[0]
    path.unlink()
    with pytest.raises(CorruptImage, match="No such file"):
        held[0]


def test_imagenet_tar_is_the_folder_it_unpacks_to(tmp_path):
    source = ImageNetTar(imagenet(tmp_path / "train.tar"), 12)
    assert source.class_names == ["n01", "n02"] and len(source) == 6
    root = tmp_path / "unpacked"
    for i in range(6):
        file = root / os.fsdecode(source.files.names[i])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.files[i])
    folder = ImageFolder(root, 12)
    assert source.listing_sha256() == folder.listing_sha256()
    for ours, theirs in zip(source, folder, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        assert ours["label"] == theirs["label"]
    np.testing.assert_array_equal(
        source[4]["image"], center_crop(to_rgb(pixels(11)), 12)
    )
    assert source.name(4) == f"{tmp_path}/train.tar:n02/n02_1.JPEG"


def test_a_wrong_imagenet_tar_is_named_with_the_right_one(tmp_path):
    path = tmp_path / "train.tar"
    with pytest.raises(UserError, match=r"no file .*train\.tar; put ILSVRC2012_img_tr"):
        ImageNetTar(path)
    path.write_bytes(tar({"ILSVRC2012_val_00000001.JPEG": png(0)}))
    with pytest.raises(UserError, match="00001.JPEG instead of one tar .*147,897,477"):
        ImageNetTar(path)
    path.write_bytes(tar({}))
    with pytest.raises(UserError, match="holds nothing instead of one tar a class"):
        ImageNetTar(path)
    path.write_bytes(tar({"n01.tar": tar({"readme.txt": b"none"})}))
    with pytest.raises(UserError, match=r"no images in n01\.tar"):
        ImageNetTar(path)
    whole = imagenet(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.tar: 'n0.\.tar' .*cut short"):
        ImageNetTar(path)


def samples(count, start=0, label="cls"):
    """Files of webdataset samples, each an image and a label."""
    files = {}
    for i in range(start, start + count):
        files[f"{i:04d}.jpg"] = png(i)
        said = b"%d\n" % (i % 3) if label == "cls" else b'{"label": %d}' % (i % 3)
        files[f"{i:04d}.{label}"] = said
    return files


@pytest.mark.parametrize("label", ["cls", "json"])
def test_webdataset_tars_are_read_in_order(tmp_path, label):
    (tmp_path / "b.tar").write_bytes(tar(samples(2, 3, label)))
    (tmp_path / "a.tar").write_bytes(tar(samples(3, 0, label)))
    (tmp_path / "readme.txt").write_text("nothing")
    source = WebdatasetTars(tmp_path, 12, classes=3)
    assert (len(source), source.classes, source.shape) == (5, 3, (12, 12, 3))
    for i, record in enumerate(source):
        wanted = center_crop(to_rgb(pixels(i)), 12)
        np.testing.assert_array_equal(record["image"], wanted)
        assert record["label"] == i % 3
    assert source.name(3) == f"{tmp_path}/b.tar:0003.jpg"


def test_webdataset_labels_may_come_first_and_elsewhere_in_json(tmp_path):
    files = {
        "x/7.json": b'{"meta": 1, "cls": 2}',
        "x/7.meta.txt": b"",
        "x/7.jpg": png(0),
    }
    (tmp_path / "a.tar").write_bytes(tar(files))
    source = WebdatasetTars(tmp_path, 12, classes=3, field="cls")
    assert [int(r["label"]) for r in source] == [2]


@pytest.mark.parametrize(
    "files, says",
    [
        ({"0.jpg": b"x"}, r"a\.tar: 0 has no label \(.cls or .json\)"),
        ({"0.cls": b"1", "1.jpg": b"x", "1.cls": b"1"}, r"a\.tar: 0 has no image"),
        ({"0.cls": b"1"}, r"no images in .*a\.tar"),
        ({"0.jpg": b"x", "0.png": b"x", "0.cls": b"1"}, "two images for the key 0"),
        ({"0.jpg": b"x", "0.cls": b"dog"}, r"0\.cls does not hold a number"),
        (
            {"0.jpg": b"x", "0.json": b"[]"},
            "does not hold a number at 'label'",
        ),
        ({"0.jpg": b"x", "0.json": b'{"label": true}'}, "does not hold a number"),
        ({"0.jpg": b"x", "0.json": b"{"}, "does not hold a number"),
        (
            {"0.jpg": b"x", "0.cls": b"3"},
            "has label 3, but there are 3 classes",
        ),
        ({"../0.jpg": b"x", "0.cls": b"1"}, "leads out of the tar"),
    ],
    ids="unlabelled imageless no-images two word list bool torn range climbing".split(),
)
def test_wrong_webdataset_tars_are_refused(tmp_path, files, says):
    (tmp_path / "a.tar").write_bytes(tar(files))
    with pytest.raises(UserError, match=says):
        WebdatasetTars(tmp_path, 12, classes=3)


def test_a_folder_without_tars_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no .tar files in {tmp_path}; --kind"):
        WebdatasetTars(tmp_path)


class Prepared(list):
    """What tfds.data_source returns, as far as it is used."""

    features = {"label": types.SimpleNamespace(names=["cat", "dog"], num_classes=2)}
    dataset_info = types.SimpleNamespace(full_name="pets/1.0.0", features=features)


def tfds(monkeypatch, data_source):
    """Puts a stand-in for tensorflow_datasets where imports find it."""
    module = types.ModuleType("tensorflow_datasets")
    module.decode = types.SimpleNamespace(SkipDecoding=lambda: "bytes, please")
    module.data_source = data_source
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_tfds_is_read_through_its_data_source(monkeypatch):
    asked = []
    records = [
        {"image": png(0), "label": np.int64(1)},
        {"image": pixels(1), "label": np.int64(0)},  # of a version that decodes anyway
    ]

    def data_source(name, **settings):
        asked.append((name, settings))
        return Prepared(records)

    tfds(monkeypatch, data_source)
    source = Tfds("pets", "test", 16, data_dir="there")
    decoders = {"image": "bytes, please"}
    wanted = {"split": "test", "data_dir": "there", "download": False}
    assert asked == [("pets", wanted | {"decoders": decoders})]
    assert (len(source), source.shape, source.classes) == (2, (16, 16, 3), 2)
    assert source.class_names == ["cat", "dog"] and source.flip
    for i in range(2):
        image = source[i]["image"]
        np.testing.assert_array_equal(image, pixels(i)[:, 2:18])  # already 16 high
        np.testing.assert_array_equal(source.flipped(i)["image"], image[:, ::-1])
    assert [int(r["label"]) for r in source] == [1, 0]
    assert source.name(1) == "pets/1.0.0/test[1]" and len(source.listing_sha256()) == 64
    copy = copy_module.copy(source)  # by what pickle sends; it opens its own files
    assert copy[0]["label"] == 1 and len(asked) == 2


def raising(error):
    def data_source(name, **settings):
        raise error

    return data_source


@pytest.mark.parametrize(
    "error, says",
    [
        (AssertionError("could not find data\nin"), "preparing it needs TensorFlow"),
        (
            NotImplementedError("random access"),
            "prepared as array_record in its ",
        ),
        (
            ImportError("no", name="tensorflow.io"),
            "needs tensorflow: pip install",
        ),
        (ImportError("no", name="importlib_resources"), "install importlib-resources;"),
    ],
    ids=["unprepared", "format", "tensorflow", "resources"],
)
def test_tfds_says_in_one_line_what_is_missing(monkeypatch, error, says):
    tfds(monkeypatch, raising(error))
    with pytest.raises(UserError, match=says) as caught:
        Tfds("imagenet2012")
    assert "ImageNetTar or ImageFolder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tfds_itself_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        Tfds("imagenet2012")
