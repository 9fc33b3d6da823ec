"""Tars read in place: the right bytes, and no trust in what an archive says."""

import io
import tarfile

import numpy as np
import pytest
from photographs import pixels, png
from tar_files import tar

from sit_jax.data.archives import ImageNetTar
from sit_jax.data.folders import ImageFolder
from sit_jax.data.images import BrokenImage, center_crop, rgb
from sit_jax.data.tars import Members, read_members
from sit_jax.errors import UserError

LONG = "folder/" + "x" * 120 + "/" + "y" * 130 + ".jpg"


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
    path.write_bytes(b"before" + tar(files, format))
    members = list(read_members(path, start=6))
    assert [m.name for m in members] == list(files)
    held = Members([path], [0] * len(members), members)
    assert [held[i] for i in range(len(held))] == list(files.values())
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
    field = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    data[124:136] = field
    total = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % total
    return bytes(data)


def negative():
    data = bytearray(tar({"a.jpg": b"12"}))
    data[124:136] = b"-0000001000\0"
    total = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % total
    return bytes(data)


def pax(record):
    """A tar with this extended header before its only file."""

    def change(member):
        member.type = tarfile.XHDTYPE if member.name == "header" else tarfile.REGTYPE

    return tar({"header": record, "a.jpg": b"12"}, change=change)


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
    "negative": (negative(), "no tar, or damaged at byte 0"),
    "checksum": (
        tar({"a.jpg": b"12"}).replace(b"a.jpg", b"b.jpg"),
        "damaged at byte 0",
    ),
    "cut": (
        tar({"a.jpg": b"x" * 2000})[:1300],
        "only 788 are there; the tar is cut",
    ),
    "header": (tar({"a.jpg": b"x"})[:300], "no tar, or damaged at byte 0"),
    "text": (b"<html>not found</html>" * 40, "no tar, or damaged at byte 0"),
    "later": (tar({"a": b"x"})[:1024] + b"?" * 512, "damaged at byte 1024"),
    "gzip": (b"\x1f\x8b" + b"\0" * 600, "packed with gzip and cannot be read in place"),
    "xz": (b"\xfd7zXZ" + b"\0" * 600, "packed with xz"),
    "pax path": (pax(b"16 path=../../x\n"), "leads out of the tar"),
    "pax size": (pax(b"20 size=99999999999\n"), "says it has 99999999999 bytes"),
    "pax word": (pax(b"12 size=abc\n"), "is a damaged header"),
    "pax length": (pax(b"0 a=b\n"), "is a damaged header"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tars_are_refused(tmp_path, case):
    data, says = WRONG[case]
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        list(read_members(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_extended_header_is_not_read(tmp_path):
    name = "x" * (2**20 + 1)
    (tmp_path / "x.tar").write_bytes(tar({name: b""}))
    with pytest.raises(UserError, match="more than 1048576"):
        list(read_members(tmp_path / "x.tar"))


def test_members_notice_a_tar_that_changed(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar({"a.jpg": b"x" * 700}))
    held = Members([path], [0], list(read_members(path)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BrokenImage, match="ends 212 bytes early"):
        held[0]
    path.unlink()
    with pytest.raises(BrokenImage, match="No such file"):
        held[0]


def test_imagenet_tar_is_the_folder_it_unpacks_to(tmp_path):
    source = ImageNetTar(imagenet(tmp_path / "train.tar"), 12)
    assert source.class_names == ["n01", "n02"] and len(source) == 6
    root = tmp_path / "unpacked"
    for i in range(6):
        file = root / source.files.names[i]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.files[i])
    folder = ImageFolder(root, 12)
    assert source.listing() == folder.listing()
    for ours, theirs in zip(source, folder, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        assert ours["label"] == theirs["label"]
    np.testing.assert_array_equal(source[4]["image"], center_crop(rgb(pixels(11)), 12))
    assert source.name(4) == f"{tmp_path}/train.tar:n02/n02_1.JPEG"


def test_a_wrong_imagenet_tar_is_named_with_the_right_one(tmp_path):
    path = tmp_path / "train.tar"
    with pytest.raises(UserError, match=r"no file .*train\.tar; put ILSVRC2012_img_tr"):
        ImageNetTar(path)
    path.write_bytes(tar({"ILSVRC2012_val_00000001.JPEG": png(0)}))
    with pytest.raises(UserError, match="00001.JPEG instead of one tar .*147,897,477"):
        ImageNetTar(path)
    path.write_bytes(tar({}))
    with pytest.raises(UserError, match="is empty; put ILSVRC2012"):
        ImageNetTar(path)
    path.write_bytes(tar({"n01.tar": tar({"readme.txt": b"none"})}))
    with pytest.raises(UserError, match=r"no images in n01\.tar"):
        ImageNetTar(path)
    whole = imagenet(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.tar: 'n0.\.tar' .* cut short"):
        ImageNetTar(path)
