"""CIFAR-10 and CIFAR-100 from disk: as folders of images, or as the binary batches."""

from pathlib import Path

import numpy as np

from sit_jax.data.arrays import Arrays
from sit_jax.data.folders import ImageFolder, require_folder
from sit_jax.errors import UserError

BATCHES = {True: "data_batch_*.bin", False: "test_batch.bin"}
ROW = 1 + 3 * 32 * 32  # label, then the red, green and blue planes


class CifarFolder(ImageFolder):
    """path/train/<class>/*.png or .jpg, and path/test/ alike; images [32, 32, 3]."""

    def __init__(
        self,
        path: str,
        train: bool = True,
        flip: bool = True,
        broken_share: float = 0.001,
    ):
        root = require_folder(path)
        _refuse_pickles(root)
        super().__init__(root / ("train" if train else "test"), 32, flip, broken_share)


class CifarBinary(Arrays):
    """The batches of cifar-10-binary.tar.gz, unpacked: cifar-10-batches-bin."""

    def __init__(self, path: str, train: bool = True, flip: bool = True):
        root = require_folder(path)
        _refuse_pickles(root)
        files = sorted(root.glob(BATCHES[train]))
        if not files:
            raise UserError(f"no {BATCHES[train]} in {root}; unpack the binary version")
        rows = np.concatenate([_rows(file) for file in files])
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        super().__init__(np.ascontiguousarray(images), rows[:, 0], 10, flip)
        names = root / "batches.meta.txt"
        if names.exists():
            self.class_names = names.read_text().split()[:10]


def _rows(file):
    data = file.read_bytes()
    if not data or len(data) % ROW:
        raise UserError(
            f"{file} has {len(data)} bytes, no multiple of {ROW}; unpack it again"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, ROW)


def _refuse_pickles(root: Path):
    if any((root / name).exists() for name in ("data_batch_1", "test_batch")):
        raise UserError(
            f"{root} holds CIFAR's python batches, which are pickles and could run "
            "code; unpack cifar-10-binary.tar.gz for CifarBinary (--kind cifar-binary)"
        )
