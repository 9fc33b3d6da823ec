"""Folders of image files: a folder a class, or the class in the file's name."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from sit_jax.data.images import Images
from sit_jax.errors import UserError
from sit_jax.files import local_path

# what torchvision's ImageFolder takes for images, and what ADM's loader does
ENDINGS = ".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp".split()
ADM_ENDINGS = ".jpg .jpeg .png .gif".split()


class FolderImages(Images):
    """Images whose names are paths below the folder `root`."""

    root: Path

    def read(self, i):
        return Path(self.name(i)).read_bytes(), self.labels[i]

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))


@dataclasses.dataclass(eq=False)
class ImageFolder(FolderImages):
    """path/<class>/**/<image>: classes and images in torchvision's order.

    Class c is the c-th of the sorted names of folders. Hidden entries, files that do
    not end like images and files beside the folders are left out; `remarks` has a
    sentence on each kind of what its owner may not have meant.
    """

    path: str

    def __post_init__(self):
        root = self.root = self.find_root()
        entries = _visible(root)
        classes = [entry.name for entry in entries if entry.is_dir()]
        beside = [entry.path for entry in entries if not entry.is_dir()]
        if not classes:
            raise UserError(
                f"{root} holds no folders; it needs one a class, or files named "
                "ClassID_ImgID.jpg for AdmFolder (--kind adm)"
            )
        others, names, labels = [], [], []
        for label, name in enumerate(classes):
            files = sorted(_files_below(root / name), key=os.path.split)
            images = [file for file in files if is_image(file)]
            others += [file for file in files if not is_image(file)]
            if not images:
                raise UserError(f"no images in {root / name}; remove it or fill it")
            names += [os.path.relpath(image, root) for image in images]
            labels += [label] * len(images)
        self.set_images(names, labels, classes)
        self.remarks = [
            f"{len(files)} files are left out, as they {reason}: {files[0]} .."
            for files, reason in (
                (beside, "lie beside the folders of the classes"),
                (others, f"do not end in {', '.join(ENDINGS)}"),
            )
            if files
        ]
        if len(classes) == 1 and any(e.is_dir() for e in _visible(root / classes[0])):
            self.remarks.append(  # as unpacking a zip leaves it
                f"all images are of one class, {classes[0]}; if its folders are the "
                f"classes, name {root / classes[0]} instead"
            )

    def find_root(self) -> Path:
        """Returns the folder that holds the folders of the classes."""
        return require_folder(self.path)


@dataclasses.dataclass(eq=False)
class AdmFolder(FolderImages):
    """Files named ClassID_ImgID.jpg, in one folder or in folders below it.

    Class c is the c-th of the ids as words, so 10 comes before 2: as ADM and MDT
    number them. Files of a folder and its subfolders are sorted together.
    """

    path: str

    def __post_init__(self):
        self.root = require_folder(self.path)
        endings = tuple(ADM_ENDINGS)
        files = [f for f in _files_below(self.root) if f.lower().endswith(endings)]
        if not files:
            raise UserError(f"no images ({', '.join(ADM_ENDINGS)}) below {self.root}")
        for file in files:
            if "_" not in os.path.basename(file):
                raise UserError(
                    f"{file} has no class before a first underscore; name it "
                    "ClassID_ImgID.jpg"
                )
        ids = [os.path.basename(file).split("_")[0] for file in files]
        classes, labels = np.unique(ids, return_inverse=True)
        names = [os.path.relpath(file, self.root) for file in files]
        self.set_images(names, labels, classes.tolist())


@dataclasses.dataclass(eq=False, kw_only=True)
class CifarFolder(ImageFolder):
    """path/train/<class>/*.png or .jpg, and path/test/ alike; images [32, 32, 3]."""

    train: bool = True
    size: int = dataclasses.field(default=32, init=False)

    def find_root(self):
        root = require_folder(self.path)
        return require_folder(root / ("train" if self.train else "test"))


def is_image(name: str) -> bool:
    """Returns whether a file's name ends like an image's, for torchvision."""
    return name.lower().endswith(tuple(ENDINGS))


def require_folder(path: str) -> Path:
    """Returns the Path of a folder, or refuses one that is not there."""
    path = local_path(path)
    if not path.is_dir():
        raise UserError(
            f"no folder {path}; name one that holds images, unpacked, or see --kind"
        )
    return path


def _visible(folder):
    """Returns the entries of a folder by name, without hidden ones."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: entry.name)


def _files_below(folder, above=()):
    """Yields the paths of all files, with subfolders sorted among the files."""
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files_below(entry.path, (*above, real))
        else:
            yield entry.path
