"""Published weights by name, and where each comes from.

Nothing here touches the network until fetch() is called for a file that is not there
yet. Sizes and hashes are those that are known beforehand; of files on the Hugging Face
Hub the Hub tells the sha256 with the file.
"""

import dataclasses
import os
import re
import sys
import urllib.parse
from pathlib import Path

from sit_jax import files
from sit_jax.convert.download import download
from sit_jax.errors import UserError
from sit_jax.files import (
    as_path,
    atomic_write,
    file_size,
    file_version,
    is_remote,
    require_space,
)

HUB = "https://huggingface.co"  # or a mirror of it, in HF_ENDPOINT


@dataclasses.dataclass(frozen=True)
class Release:
    """A file of weights: its source is a URL or hf:owner/repo/file."""

    source: str
    licence: str
    family: str | None = None  # whose weights: sit, dit, mdt, mdtv2, vae
    config: str | None = None  # the config of the published run
    size: int | None = None  # bytes
    sha256: str | None = None

    @property
    def url(self):
        if not self.source.startswith("hf:"):
            return self.source
        owner, repo, *path = self.source.removeprefix("hf:").split("/")
        hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
        return f"{hub}/{owner}/{repo}/resolve/main/{urllib.parse.quote('/'.join(path))}"

    @property
    def place(self):
        """Where below the cache it is kept."""
        return self.source.partition(":")[2].strip("/")


FID = "https://github.com/mseitzer/pytorch-fid/releases/download"
DIT = "https://dl.fbaipublicfiles.com/DiT/models"
NO_COMMERCE = "CC BY-NC 4.0, not for commercial use"
# SiT's files moved from Dropbox to the Hub (willisma/SiT#42). No sizes or hashes are
# published for SiT, DiT and MDT apart from the Hub's own; sd-vae-ft-mse's are those of
# its revision 31f26fd.
RELEASES = {
    "sit-xl2-256": Release(
        "hf:nyu-visionx/SiT-collections/SiT-XL-2-256.pt", "MIT", "sit", "sit_xl2"
    ),
    "dit-xl2-256": Release(f"{DIT}/DiT-XL-2-256x256.pt", NO_COMMERCE, "dit", "dit_xl2"),
    "dit-xl2-512": Release(
        f"{DIT}/DiT-XL-2-512x512.pt", NO_COMMERCE, "dit", "dit_xl2_512"
    ),
    "mdt-xl2": Release(
        "hf:shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt", "Apache-2.0", "mdt", "mdt_xl2"
    ),
    "mdtv2-xl2": Release(
        "hf:shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt", "Apache-2.0", "mdtv2", "mdtv2_xl2"
    ),
    "sd-vae-ft-mse": Release(
        "hf:stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors",
        "MIT",
        "vae",
        size=334_643_276,
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "sd-vae-ft-ema": Release(
        "hf:stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors",
        "MIT",
        "vae",
    ),
    # size and hash as several public repositories quote them
    "inception": Release(
        f"{FID}/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "Apache-2.0",
        "inception",
        size=95_628_359,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
}


def find(name):
    """-> Release of a name of the table or of hf:owner/repo/file; None of a path."""
    name = str(name)
    if name in RELEASES:
        return RELEASES[name]
    if not name.startswith("hf:"):
        return None
    parts = name.removeprefix("hf:").split("/")
    if len(parts) < 3 or not all(re.fullmatch(r"(?!\.+$)[\w.+ -]+", p) for p in parts):
        raise UserError(f"{name!r} is not hf:owner/repo/file")
    return Release(name, f"see {HUB}/{parts[0]}/{parts[1]}")


def cache():
    """The folder that downloads are kept in."""
    place = os.environ.get("SIT_JAX_CACHE") or "~/.cache/sit_jax"
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder for ~/.cache/sit_jax; name a folder in "
            "SIT_JAX_CACHE"
        ) from error


def fetch(name):
    """-> Path of a release's file, loaded if it is not there; of a path, itself.

    A bucket's files are loaded too, its folders are read where they are.
    """
    release = find(name)
    if release is None:
        path = as_path(name)
        return _brought(path) if is_remote(path) and path.is_file() else path
    if Path(name).exists():
        raise UserError(
            f"{name} is the name of a release, and something here is called so; "
            f"./{name} is what is here"
        )
    path = cache() / release.place
    if not path.exists():
        print(f"{name}: from {release.url}, licence {release.licence}", file=sys.stderr)
        download(release.url, path, release.size, release.sha256)
    elif release.size not in (None, path.stat().st_size):
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, {name} has {release.size}; "
            "remove it to load it again"
        )
    return path


def _brought(path):
    """-> this machine's copy of a bucket's file; another version is another copy."""
    if re.fullmatch(r"model\d+\.pt", path.name):
        raise UserError(f"{path} is one of several files; copy its folder to a disk")
    version = str(file_version(path)[1])
    here = cache() / "gs" / str(path).removeprefix("gs://") / version / path.name
    if not here.exists():
        print(f"{path}: copied to {here}", file=sys.stderr)
        require_space(here, file_size(path))
        with atomic_write(here) as name:
            files.download(path, name)
    return here
