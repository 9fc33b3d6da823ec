"""Where records come from. A source is a sequence of dicts of numpy arrays.

Each record holds "label", an int32 in [0, classes), and one of
"image" uint8 [H, W, C], "moments" float32 [H, W, 2C] (mean, log variance of a VAE),
"latent" float32 [H, W, C] (already scaled). `source.shape` is that array's shape and
`source.classes` the number of classes. Where `source.flip` is true, source.mirrored(i)
is record i seen in a mirror, and batches take it half of the time. A BrokenImage is
replaced by another record. Sources can be pickled and need no JAX.
"""

import dataclasses
import math
import re

import numpy as np

from sit_jax.errors import UserError
from sit_jax.files import local_path

KINDS = {"image": np.uint8, "moments": np.float32, "latent": np.float32}
HEADER = (  # of a .npy file: {'descr': '<f4', 'fortran_order': False, 'shape': (1,), }
    re.compile(rb"'descr': *'([<>|=][fiu][1248])'"),
    re.compile(rb"'fortran_order': *(True|False)"),
    re.compile(rb"'shape': *\(([\d, ]*)\)"),
)
OTHERS = (
    "--config.source.path=DIR names another, configs/sit_xl2_cached.py is for what "
    "extract_features.py writes, --config.synthetic=True for random latents"
)


class Digits:
    """The 1,797 handwritten digits of scikit-learn, images [8, 8, 1].

    The split is the same for everybody: held_out records, each class in its share.
    """

    shape, classes = (8, 8, 1), 10

    def __init__(self, train: bool = True, held_out: int = 500, seed: int = 0):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                "the digits come with scikit-learn: pip install scikit-learn"
            ) from error
        if seed < 0:
            raise UserError(f"seed={seed} of Digits must be at least 0")
        scans = load_digits()
        if not 0 < held_out < len(scans.target):
            raise UserError(
                f"held_out={held_out} leaves nothing to train or to test on; "
                f"there are {len(scans.target)} digits"
            )
        ids = _split(scans.target, held_out, seed)[0 if train else 1]
        grey = np.round(scans.images[ids] * (255 / 16))  # 16 is full ink
        self.images = grey.astype(np.uint8)[..., None]  # [N, 8, 8, 1]
        self.labels = scans.target[ids].astype(np.int32)  # [N]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.labels[i]}


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Normal noise as latents: for trying things out. Record i follows from seed, i."""

    shape: tuple = (32, 32, 4)
    classes: int = 1000
    length: int = 4096
    seed: int = 0

    def __post_init__(self):
        if self.classes < 1 or self.length < 1:
            raise UserError(
                f"Synthetic has {self.classes} classes and {self.length} records; at "
                "least 1 of each"
            )

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        rng = np.random.default_rng((self.seed, i))
        latent = rng.standard_normal(self.shape, np.float32)
        return {"latent": latent, "label": np.int32(rng.integers(self.classes))}


class LatentFolder:
    """fast-DiT's folder of latents [H, W, 4], one file an image.

    path/imagenet256_features/{i}.npy is float32 [1, 4, H, W], one draw of the VAE's
    posterior with the scale 0.18215 and a random flip already in it;
    path/imagenet256_labels/{i}.npy is an integer [1]. The names say 256 at any size.
    """

    def __init__(self, path: str, classes: int = 1000):
        folder = local_path(path)
        self.features = folder / "imagenet256_features"
        self.targets = folder / "imagenet256_labels"
        self.classes = classes
        self.names = _names(self.features)
        _same(self.names, _names(self.targets), folder)
        self.shape = None  # any, for the first record
        self.shape = self[0]["latent"].shape

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        latent, label = _read(self.features / name), _read(self.targets / name)
        if latent.ndim == 4 and len(latent) == 1:
            latent = latent[0]
        if latent.ndim != 3 or latent.dtype.kind != "f":
            self._refuse(name, latent, "floats [1, C, H, W]")
        latent = np.ascontiguousarray(np.moveaxis(latent, 0, -1), np.float32)
        if self.shape not in (None, latent.shape):
            self._refuse(name, latent, f"{list(self.shape)} as in {self.names[0]}")
        if label.size != 1 or label.dtype.kind not in "iu":
            raise UserError(
                f"{self.targets / name} holds {label.dtype} {list(label.shape)} "
                "instead of one integer; extract this label again"
            )
        label = label.item()
        if not 0 <= label < self.classes:
            raise UserError(
                f"{self.targets / name} holds label {label}, but there are "
                f"{self.classes} classes (0..{self.classes - 1}); set classes"
            )
        return {"latent": latent, "label": np.int32(label)}

    def _refuse(self, name, latent, wanted):
        raise UserError(
            f"{self.features / name} holds {latent.dtype} {list(latent.shape)} "
            f"instead of {wanted}; extract this latent again"
        )


def _split(labels, held_out, seed):
    """-> ids to train on, ids held out; every class gives its share of the latter."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # of a record within its class, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    ranked = order[np.argsort(place[order], kind="stable")]
    return np.sort(ranked[held_out:]), np.sort(ranked[:held_out])


def _names(folder):
    """Names of the .npy files, 2 before 10, as they were numbered."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; {OTHERS}")
    names = [path.name for path in folder.iterdir() if path.suffix == ".npy"]
    if not names:
        raise UserError(f"no .npy files in {folder}; {OTHERS}")
    return sorted(names, key=lambda name: (len(name), name))


def _same(features, labels, folder):
    odd = sorted(set(features) ^ set(labels))
    if odd:
        raise UserError(
            f"{folder} has {len(features)} latents and {len(labels)} labels; "
            f"{odd[0]} is in one folder only; extract it again or remove it"
        )


def _read(path):
    """The array of a .npy file of numbers (NEP 1); objects and code are refused.

    Not by numpy: it evaluates the header with ast, which in threads of Python 3.11
    ends in a SystemError now and then (cpython#106905).
    """
    try:
        data = path.read_bytes()
        start = 10 if data[6:7] == b"\1" else 12  # of the header, after its length
        end = start + int.from_bytes(data[8:start], "little")
        found = [key.search(data[start:end]) for key in HEADER]
        if data[:6] != b"\x93NUMPY" or None in found:
            raise ValueError("no .npy file of numbers")
        dtype, fortran, shape = (match[1].decode() for match in found)
        shape = [int(size) for size in shape.replace(",", " ").split()]
        array = np.frombuffer(data, dtype, math.prod(shape), end)
        return array.reshape(shape, order="F" if fortran == "True" else "C")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot read {path} ({reason}); extract this file again"
        ) from error
