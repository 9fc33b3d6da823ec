"""Tars made of names and contents."""

import io
import tarfile


def tar(files, format=tarfile.GNU_FORMAT, change=lambda member: None):
    """{name: bytes} -> the bytes of a tar; change(TarInfo) spoils members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as out:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            change(member)
            out.addfile(member, io.BytesIO(data))
    return file.getvalue()
