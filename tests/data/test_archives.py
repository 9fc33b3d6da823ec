"""Tars read in place, with no trust in what they say, and sets of TFDS."""

import io
import os
import sys
import tarfile
import types

import numpy as np
import pytest
from helpers.pictures import pixels, png

from sit_jax.data.archives import ImageNetTar, Tfds, WebdatasetTars, read_members
from sit_jax.data.folders import ImageFolder
from sit_jax.data.images import CorruptImage, center_crop, to_rgb
from sit_jax.errors import UserError

LONG = "folder/" + "x" * 120 + "/" + "y" * 130 + ".jpg"


def tar(files, format=tarfile.GNU_FORMAT, **fields):
    """Returns the bytes of a tar of {name: bytes}; fields of TarInfo spoil them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as out:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            out.addfile(member, io.BytesIO(data))
    return file.getvalue()


def imagenet(path):
    """A tar of two tars; image n of the c-th class in order is pixels(10 * c + n)."""
    inner = {}
    for label, name in ((1, "n02"), (0, "n01")):
        files = {f"{name}_{i}.JPEG": png(10 * label + i) for i in (2, 1, 0)}
        inner[f"{name}.tar"] = tar(files)
    path.write_bytes(tar(inner))
    return path


@pytest.mark.parametrize(
    "format",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_members_are_read_in_place(tmp_path, format):
    files = {"a.jpg": b"1234", "empty": b"", "b/" + "c" * 80 + "/d.png": b"x" * 5000}
    files["über.jpg"] = b"u" * 512
    if format != tarfile.USTAR_FORMAT:  # which has no room for it
        files[LONG] = b"long" * 300
    path = tmp_path / "x.tar"
    path.write_bytes(tar(files, format))
    members = read_members(path)
    assert {member.name: member.read() for member in members} == files
    path.write_bytes(path.read_bytes()[: members[2].offset + 1000])
    with pytest.raises(CorruptImage, match="ends 4000 bytes early"):
        members[2].read()


def test_members_skip_folders_and_need_no_end(tmp_path):
    path = tmp_path / "x.tar"
    folder = tar({"a": b""}, type=tarfile.DIRTYPE)[:512]
    path.write_bytes(folder + tar({"a/b": b""})[:512])  # without the blocks of zeros
    assert [m.name for m in read_members(path)] == ["a/b"]


def claiming(size):
    """A tar whose first header says that its file has this many bytes."""
    data = bytearray(tar({"a.jpg": b"12"}))
    data[124:136] = (
        b"\x80" + size.to_bytes(11, "big") if size > 0 else b"%011o\0" % size
    )
    total = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % total
    return bytes(data)


def pax(record, repeats=1):
    """A tar with this extended header before its only file."""
    header = tar({"header": record}, type=tarfile.XHDTYPE)[:1024]
    return header * repeats + tar({"a.jpg": b"12"})


WRONG = {
    "symlink": (tar({"a": b""}, type=tarfile.SYMTYPE), "'a' is a link or a device"),
    "device": (tar({"a": b""}, type=tarfile.CHRTYPE), "'a' is a link or a device"),
    "giant": (claiming(2**60), "cut short"),
    "negative": (claiming(-0o1000), "cut short"),
    "checksum": (tar({"a.jpg": b"12"}).replace(b"a.jpg", b"b.jpg"), "bad checksum"),
    "cut": (tar({"a.jpg": b"x" * 2000})[:1300], "unexpected end of data"),
    "header": (tar({"a.jpg": b"x"})[:300], "truncated header"),
    "empty": (b"", "empty file"),
    "text": (b"<html>not found</html>" * 40, "invalid header|bad checksum"),
    "later": (tar({"a": b"x"})[:1024] + b"?" * 512, "no header at byte 1024"),
    "gzip": (b"\x1f\x8b" + b"\0" * 600, "bad checksum|invalid header"),
    "pax size": (pax(b"20 size=99999999999\n"), "unexpected end of data"),
    "nested": (pax(b"10 a=bbbb\n", 2000), "recursion"),
    "pax length": (pax(b"0 a=b\n"), "invalid header"),
}


@pytest.mark.parametrize("case", WRONG)
def test_read_members_refuses_wrong_tars(tmp_path, case):
    data, message = WRONG[case]
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_members(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_imagenet_tar_is_the_folder_it_unpacks_to(tmp_path):
    source = ImageNetTar(imagenet(tmp_path / "train.tar"), size=12)
    assert source.class_names == ["n01", "n02"] and len(source) == 6
    root = tmp_path / "unpacked"
    for i in range(6):
        file = root / os.fsdecode(source.names[i])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read(i)[0])
    folder = ImageFolder(root, size=12)
    assert source.listing_sha256() == folder.listing_sha256()
    for ours, theirs in zip(source, folder, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        assert ours["label"] == theirs["label"]
    wanted = center_crop(to_rgb(pixels(11)), 12)
    np.testing.assert_array_equal(source[4]["image"], wanted)
    assert source.name(4) == f"{tmp_path}/train.tar:n02/n02_1.JPEG"
    (tmp_path / "train.tar").unlink()
    with pytest.raises(CorruptImage, match="n02_1.JPEG: No such file"):
        source[4]


def test_imagenet_tar_names_the_right_one_where_it_is_wrong(tmp_path):
    path = tmp_path / "train.tar"
    with pytest.raises(UserError, match=r"no file .*train\.tar; put ILSVRC2012_img_tr"):
        ImageNetTar(path)
    whole = imagenet(path).read_bytes()
    for data, message in (
        (tar({"val_1.JPEG": png(0)}), "holds val_1.JPEG instead of one tar .*147,897"),
        (tar({}), "is empty; give ILSVRC2012"),
        (tar({"n01.tar": tar({"readme.txt": b"none"})}), r"no images in n01\.tar"),
        (whole[: len(whole) // 2], r"train\.tar is .* cut short \(unexpected end"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            ImageNetTar(path)


def samples(ids, ending="cls"):
    """Files of webdataset samples, each an image and a label."""
    text = b"%d\n" if ending == "cls" else b'{"label": %d}'
    return {
        name: data
        for i in ids
        for name, data in ((f"{i}.jpg", png(i)), (f"{i}.{ending}", text % (i % 3)))
    }


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_webdataset_tars_are_read_in_order(tmp_path, ending):
    (tmp_path / "b.tar").write_bytes(tar(samples((3, 4), ending)))
    (tmp_path / "a.tar").write_bytes(tar(samples((0, 1, 2), ending)))
    source = WebdatasetTars(tmp_path, size=12, classes=3)
    assert (len(source), source.classes, source.shape) == (5, 3, (12, 12, 3))
    for i, record in enumerate(source):
        wanted = center_crop(to_rgb(pixels(i)), 12)
        np.testing.assert_array_equal(record["image"], wanted)
        assert record["label"] == i % 3
    assert source.name(3) == f"{tmp_path}/b.tar:3.jpg"


def test_webdataset_labels_may_come_first_and_elsewhere_in_json(tmp_path):
    files = {"x/7.json": b'{"a": 1, "cls": 2}', "x/7.meta.txt": b"", "x/7.jpg": png(0)}
    (tmp_path / "a.tar").write_bytes(tar(files))
    source = WebdatasetTars(tmp_path, size=12, classes=3, field="cls")
    assert [int(r["label"]) for r in source] == [2]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"0.jpg": b"x"}, r"a\.tar: 0 has no label \(.cls or .json\)"),
        ({"0.cls": b"1", "1.jpg": b"x", "1.cls": b"1"}, r"a\.tar: 0 has no image"),
        ({"0.cls": b"1"}, r"no images in .*a\.tar"),
        ({"0.jpg": b"x", "0.png": b"x", "0.cls": b"1"}, "two images for the key 0"),
        ({"0.jpg": b"x", "0.cls": b"dog"}, r"0\.cls holds no number from 0 to 2;"),
        ({"0.jpg": b"x", "0.cls": b"3"}, r"0\.cls holds no number from 0 to 2;"),
        ({"0.jpg": b"x", "0.json": b"[]"}, "no number from 0 to 2 at 'label'"),
        ({"0.jpg": b"x", "0.json": b'{"label": true}'}, "no number from 0 to 2 at"),
        ({"0.jpg": b"x", "0.json": b"{"}, "no number from 0 to 2 at 'label'"),
        ({}, "no images in"),
    ],
    ids="unlabelled imageless no-images two word range list bool torn empty".split(),
)
def test_webdataset_refuses_wrong_tars(tmp_path, files, message):
    with pytest.raises(UserError, match=f"no .tar files in {tmp_path}; --kind"):
        WebdatasetTars(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar(files))
    with pytest.raises(UserError, match=message):
        WebdatasetTars(tmp_path, size=12, classes=3)


class Prepared(list):
    """What tfds.data_source returns, as far as it is used."""

    features = {"label": types.SimpleNamespace(names=["cat", "dog"])}
    dataset_info = types.SimpleNamespace(full_name="pets/1.0.0", features=features)


def install_tfds(monkeypatch, data_source):
    """Puts a stand-in for tensorflow_datasets where imports find it."""
    module = types.ModuleType("tensorflow_datasets")
    module.decode = types.SimpleNamespace(SkipDecoding=lambda: "bytes, please")
    module.data_source = data_source
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_tfds_is_read_through_its_data_source(monkeypatch):
    calls = []
    records = [
        {"image": png(0), "label": np.int64(1)},
        {"image": pixels(1), "label": np.int64(0)},  # of a version that decodes anyway
    ]

    def data_source(name, **settings):
        calls.append((name, settings))
        return Prepared(records)

    install_tfds(monkeypatch, data_source)
    source = Tfds("pets", "test", data_dir="there", size=16)
    decoders = {"image": "bytes, please"}
    wanted = {"split": "test", "data_dir": "there", "download": False}
    assert calls == [("pets", wanted | {"decoders": decoders})]
    assert (len(source), source.shape, source.classes) == (2, (16, 16, 3), 2)
    assert source.class_names == ["cat", "dog"] and source.flip
    for i in range(2):
        image = source[i]["image"]
        np.testing.assert_array_equal(image, pixels(i)[:, 2:18])  # already 16 high
        np.testing.assert_array_equal(source.flipped(i)["image"], image[:, ::-1])
    assert [int(r["label"]) for r in source] == [1, 0]
    assert source.name(1) == "pets/1.0.0/test[1]" and len(source.listing_sha256()) == 64


@pytest.mark.parametrize(
    "error, message",
    [
        (
            AssertionError("no data\nin"),
            r"\(no data\); preparing it .*needs TensorFlow",
        ),
        (NotImplementedError("random access"), r"in its folder \(random access\)"),
        (ImportError("no", name="tensorflow.io"), "needs tensorflow: pip install"),
        (ImportError("no", name="importlib_resources"), "install importlib-resources;"),
        (None, "pip install tensorflow-datasets"),
    ],
    ids=["unprepared", "format", "tensorflow", "resources", "absent"],
)
def test_tfds_says_in_one_line_what_is_missing(monkeypatch, error, message):
    def data_source(name, **settings):
        raise error

    install_tfds(monkeypatch, data_source)
    if error is None:
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=message) as caught:
        Tfds("imagenet2012")
    assert "ImageNetTar or ImageFolder" in str(caught.value)
    assert "\n" not in str(caught.value)
