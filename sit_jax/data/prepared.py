"""Data sets that tensorflow-datasets has prepared, read without TensorFlow."""

import hashlib

import numpy as np

from sit_jax.data.images import Images
from sit_jax.errors import UserError

OURS = "or read the original files with ImageNetTar or ImageFolder"


class Tfds(Images):
    """tfds.data_source(dataset, split): images of a data set that is prepared already.

    Prepared in the file format array_record, the only one with random access. For that
    many sets, imagenet2012 among them, need TensorFlow; reading does not. data_dir:
    tfds's own by default.
    """

    # tfds imports the module that `dataset` names: a stored config may not have it
    named_by_user_only = True

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        size: int = 256,
        data_dir: str = None,
        flip: bool = True,
        broken_share: float = 0.001,
    ):
        self._from, self._opened = (dataset, split, data_dir), None
        source = self._open()
        info = source.dataset_info
        self.full_name, self._length = info.full_name, len(source)
        names = info.features["label"].names
        super().__init__(None, (), names, size, flip, broken_share)

    def __len__(self):
        return self._length

    def read(self, i):
        if not 0 <= i < self._length:
            raise IndexError(i)
        record = self._open()[i]
        return record["image"], np.int32(record["label"])

    def name(self, i):
        return f"{self.full_name}/{self._from[1]}[{i}]"

    def listing(self):
        """sha256 of the data set's name with version, its split and its length."""
        words = (self.full_name, self._from[1], str(self._length))
        return hashlib.sha256("\0".join(words).encode()).hexdigest()

    def _open(self):
        if self._opened is None:
            self._opened = _data_source(*self._from)
        return self._opened

    def __getstate__(self):  # a copy elsewhere opens its own files
        return self.__dict__ | {"_opened": None}


def _data_source(name, split, data_dir):
    try:
        import tensorflow_datasets as tfds

        decoders = {"image": tfds.decode.SkipDecoding()}  # the file's bytes
        return tfds.data_source(
            name, split=split, data_dir=data_dir, download=False, decoders=decoders
        )
    except ImportError as error:
        missing = (error.name or "tensorflow_datasets").split(".")[0].replace("_", "-")
        raise UserError(f"tfds needs {missing}: pip install {missing}; {OURS}") from (
            error
        )
    except (AssertionError, NotImplementedError, OSError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0]
        if "split" in said:
            raise UserError(f"tfds, {name!r}: {said}") from error
        raise UserError(
            f"tfds has no {name!r} prepared as array_record in {data_dir or 'its'} "
            "folder: preparing it needs TensorFlow, once, on any machine "
            "(tfds build --file_format=array_record); " + OURS
        ) from error
