"""Folders of image files: a folder a class, or the class in the file's name."""

import os

from sit_jax.data.images import BrokenImage, Images
from sit_jax.data.names import Names
from sit_jax.errors import UserError
from sit_jax.files import local_path

# what torchvision's ImageFolder takes for images, and what ADM's loader does
ENDINGS = ".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp".split()
ADM_ENDINGS = ".jpg .jpeg .png .gif".split()


class Files:
    """The bytes of files below a folder."""

    def __init__(self, root, names):
        self.root, self.names = str(root), Names(names)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        try:
            with open(self.name(i), "rb") as file:
                return file.read()
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error

    def name(self, i):
        return os.path.join(self.root, self.names[i])


class ImageFolder(Images):
    """path/<class>/**/<image>: classes and images in torchvision's order.

    Class c is the c-th of the sorted names of folders. Hidden entries, files that do
    not end like images and files beside the folders are left out; `remarks` has a
    sentence on each kind of what its owner may not have meant.
    """

    def __init__(
        self,
        path: str,
        size: int = 256,
        flip: bool = True,
        broken_share: float = 0.001,
    ):
        root = require_folder(path)
        entries = _visible(root)
        classes = [entry.name for entry in entries if entry.is_dir()]
        beside = [entry.path for entry in entries if not entry.is_dir()]
        if not classes:
            raise UserError(
                f"{root} holds no folders; it needs one a class, or files named "
                "ClassID_ImgID.jpg for AdmFolder (--kind adm)"
            )
        self._others, names, labels = [], [], []
        for label, name in enumerate(classes):
            found = list(self._images(root / name))
            if not found:
                raise UserError(f"no images in {root / name}; remove it or fill it")
            names += [os.path.relpath(file, root) for file in found]
            labels += [label] * len(found)
        self.remarks = [*_left_out(beside, self._others), *_buried(root, classes)]
        files = Files(root, names)
        super().__init__(files, labels, classes, size, flip, broken_share)

    def _images(self, folder):
        """Paths below it, sorted by folder and then by name."""
        for _, entries in sorted(_folders(folder), key=lambda each: each[0]):
            for entry in entries:
                if entry.name.lower().endswith(tuple(ENDINGS)):
                    yield entry.path
                else:
                    self._others.append(entry.path)


class AdmFolder(Images):
    """Files named ClassID_ImgID.jpg, in one folder or in folders below it.

    Class c is the c-th of the ids as words, so 10 comes before 2: as ADM and MDT
    number them. Files of a folder and its subfolders are sorted together.
    """

    def __init__(
        self,
        path: str,
        size: int = 256,
        flip: bool = True,
        broken_share: float = 0.001,
    ):
        root = require_folder(path)
        found = list(_adm_files(root))
        if not found:
            raise UserError(f"no images ({', '.join(ADM_ENDINGS)}) below {root}")
        for file in found:
            if "_" not in os.path.basename(file):
                raise UserError(
                    f"{file} has no class before a first underscore; name it "
                    "ClassID_ImgID.jpg"
                )
        words = [os.path.basename(file).split("_")[0] for file in found]
        classes = sorted(set(words))
        number = {word: label for label, word in enumerate(classes)}
        labels = [number[word] for word in words]
        files = Files(root, [os.path.relpath(file, root) for file in found])
        super().__init__(files, labels, classes, size, flip, broken_share)


def _left_out(beside, others):
    kinds = {
        "lie beside the folders of the classes": beside,
        f"do not end in {', '.join(ENDINGS)}": others,
    }
    for why, files in kinds.items():
        if files:
            yield f"{len(files)} files are left out, as they {why}: {files[0]} .."


def _buried(root, classes):
    """A wrapper, as unpacking a zip makes, is one class of everything."""
    if len(classes) == 1 and any(e.is_dir() for e in _visible(root / classes[0])):
        yield (
            f"all images are of one class, {classes[0]}; if its folders are the "
            f"classes, name {root / classes[0]} instead"
        )


def require_folder(path):
    """-> Path of a folder that is there."""
    path = local_path(path)
    if path.is_file():
        raise UserError(
            f"{path} is a file; unpack it and name the folder, or see --kind and "
            "docs/images.md for tars"
        )
    if not path.is_dir():
        raise UserError(f"no folder {path}; name one that holds images")
    return path


def _visible(folder):
    """Entries of a folder by name, without hidden ones."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(seen, key=lambda entry: entry.name)


def _folders(folder, above=()):
    """(path, its files' entries) of a folder and of all below it."""
    here = os.path.realpath(folder)
    if here in above:  # a link that leads back up
        return
    entries = _visible(folder)
    yield str(folder), [entry for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from _folders(entry.path, (*above, here))


def _adm_files(folder, above=()):
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _adm_files(entry.path, (*above, here))
        elif entry.name.lower().endswith(tuple(ADM_ENDINGS)):
            yield entry.path
