"""Images in tars, read in place: ImageNet's tar of tars, and webdataset's shards."""

from pathlib import Path

from sit_jax.data.folders import ENDINGS, require_folder
from sit_jax.data.images import BrokenImage, Images
from sit_jax.data.tars import Members, read_members
from sit_jax.errors import UserError
from sit_jax.files import local_path, parse_json

IMAGENET = (
    "ILSVRC2012_img_train.tar (147,897,477,120 bytes, from image-net.org with an "
    "account there)"
)


class ImageNetTar(Images):
    """The training tar of ILSVRC 2012: in it one tar a class, in that the images.

    Classes and images in the order that an ImageFolder of the unpacked tar has. The
    headers of all images are read at the start, about a minute for the 1,281,167.
    """

    def __init__(
        self,
        path: str,
        size: int = 256,
        flip: bool = True,
        broken_share: float = 0.001,
    ):
        path = local_path(path)
        if not path.is_file():
            raise UserError(f"no file {path}; put {IMAGENET} there")
        outer = sorted(read_members(path, largest=2**40))
        for inner in outer:
            if not inner.name.endswith(".tar"):
                raise UserError(
                    f"{path} holds {inner.name} instead of one tar a class; give "
                    f"{IMAGENET}"
                )
        classes = [Path(inner.name).stem for inner in outer]
        members, labels = [], []
        for label, tar in enumerate(outer):
            inside = read_members(path, tar.offset, tar.offset + tar.size)
            found = [m for m in sorted(inside) if _is_image(m.name)]
            if not found:
                raise UserError(f"{path}: no images in {tar.name}; get it again")
            members += [m._replace(name=f"{classes[label]}/{m.name}") for m in found]
            labels += [label] * len(found)
        if not classes:
            raise UserError(f"{path} is empty; put {IMAGENET} there")
        files = Members([path], [0] * len(members), members)
        super().__init__(files, labels, classes, size, flip, broken_share)


class WebdatasetTars(Images):
    """A folder of tars in webdataset's layout: key.jpg with key.cls or key.json.

    key.cls is a number; key.json is a dict with a number at `field`.
    """

    def __init__(
        self,
        path: str,
        size: int = 256,
        classes: int = 1000,
        field: str = "label",
        flip: bool = True,
        broken_share: float = 0.001,
    ):
        root = require_folder(path)
        tars = sorted(root.glob("*.tar"))
        if not tars:
            raise UserError(f"no .tar files in {root}; --kind names other layouts")
        members, labels, which = [], [], []
        for number, tar in enumerate(tars):
            for image, label in _samples(tar, field):
                if not 0 <= label < classes:
                    raise UserError(
                        f"{tar}:{image.name} has label {label}, but there are "
                        f"{classes} classes (0..{classes - 1}); set classes"
                    )
                members.append(image)
                labels.append(label)
                which.append(number)
        names = [str(label) for label in range(classes)]
        files = Members(tars, which, members)
        super().__init__(files, labels, names, size, flip, broken_share)


def _is_image(name):
    return name.lower().endswith(tuple(ENDINGS))


def _samples(tar, field):
    """-> (image's Member, label) for each key of a tar, in its order."""
    images, labels = {}, {}
    for member in read_members(tar):
        folder, _, base = member.name.rpartition("/")
        key, _, ending = base.partition(".")
        key = f"{folder}/{key}"
        if _is_image(member.name):
            if key in images:
                raise UserError(f"{tar} has two images for the key {key[1:]}")
            images[key] = member
        elif ending in ("cls", "json"):
            labels[key] = _label(tar, member, ending, field)
    if not images:
        raise UserError(f"no images in {tar}; remove it or get it again")
    for key in images.keys() ^ labels.keys():
        missing = "label (.cls or .json)" if key in images else "image"
        raise UserError(f"{tar}: {key.lstrip('/')} has no {missing}")
    return [(image, labels[key]) for key, image in images.items()]


def _label(tar, member, ending, field):
    try:
        data = Members([tar], [0], [member])[0]
        value = int(data) if ending == "cls" else parse_json(data)[field]
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        return value
    except (ValueError, KeyError, TypeError, BrokenImage):
        wanted = "a number" if ending == "cls" else f"a number at {field!r}"
        raise UserError(
            f"{tar}:{member.name} does not hold {wanted}; name the field, or write "
            "the label again"
        ) from None
