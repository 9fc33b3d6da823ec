"""What torch.save's files may consist of, checked before torch opens one.

Since torch 1.6 they are zips of a pickle and the tensors' bytes, before that several
pickles and the bytes; in 2016 they were tars, which nobody reads any more.
"""

import io
import re
import zipfile

from sit_jax.convert import pickles
from sit_jax.errors import UserError

ZIP = b"PK\x03\x04"
MEMBER = re.compile(r"[^/]+/(data\.pkl|byteorder|version|\.[\w./]+|data/\d+)")
LARGEST = 2**26  # bytes of a pickle without its tensors
NUMBER = 0x1950A86A20F9469CFC6C  # that torch's files before 1.6 begin with
PARTS = 5  # pickles in those: the number, the format, the machine, content, storages


def check(path):
    """Refuses a .pt that would do anything but give tensors -> whether it is a zip.

    Damage raises any Exception.
    """
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(512)
        file.seek(0)
        try:
            if head.startswith(ZIP):
                _check_zip(file, size)
            elif head[257:262] == b"ustar":
                _check_tar(file, size)
            else:
                _check_pickles(file, size)
        except pickles.Refused as reason:
            raise UserError(f"{path} was not read: {reason}") from reason
    return head.startswith(ZIP)


def _check_zip(file, size):
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > len({member.filename for member in members}):
            raise pickles.Refused("it holds two members of one name")
        for member in members:
            name = member.filename[:100]
            if not MEMBER.fullmatch(member.filename) or ".." in name.split("/"):
                raise pickles.Refused(f"it holds {name!r}, which torch.save never adds")
            if member.compress_type != zipfile.ZIP_STORED:
                raise pickles.Refused(f"{name!r} is compressed, torch.save never does")
        sizes = [max(member.file_size, member.compress_size) for member in members]
        if sum(sizes) > size:
            raise pickles.Refused(f"its members have {sum(sizes)} bytes, itself {size}")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                if member.file_size > LARGEST:
                    raise pickles.Refused(f"its pickle has {member.file_size} bytes")
                pickles.check(io.BytesIO(archive.read(member)), size)


def _check_tar(file, size):
    import tarfile

    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isfile() and member.name in ("pickle", "tensors", "storages"):
                found = archive.extractfile(member)
                pickles.check(_Bounded(found, min(member.size, LARGEST)), size)
    raise pickles.Refused("it is a tar of torch before 0.1.10, saved by no later one")


def _check_pickles(file, size):
    bounded = _Bounded(file, LARGEST)
    first = bounded.peek(14)
    pickles.check(bounded, size)
    if NUMBER.to_bytes(10, "little") not in first:
        raise pickles.Refused("it is a pickle, but none of torch's")
    for _ in range(PARTS - 1):
        pickles.check(bounded, size)


class _Bounded:
    """A file of at most so many bytes; what it is asked for beyond does not cost."""

    def __init__(self, file, most):
        self._file, self._left = file, most

    def peek(self, count):
        found = self._file.read(count)
        self._file.seek(-len(found), io.SEEK_CUR)
        return found

    def read(self, count):
        found = self._file.read(min(count, self._left))
        self._left -= len(found)
        return found

    def readline(self):
        found = self._file.readline(self._left)
        self._left -= len(found)
        return found
