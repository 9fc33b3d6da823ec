"""Published weights by name: where each comes from, and their download.

Nothing here touches the network until fetch() is asked for a file that is not there
yet. Sizes and hashes in the table are those known beforehand; of other files on the
Hugging Face Hub the Hub gives the sha256.
"""

import dataclasses
import os
import re
import sys
import urllib.parse
from pathlib import Path

from sit_jax import files
from sit_jax.errors import UserError
from sit_jax.files import (
    as_path,
    atomic_write,
    file_size,
    file_version,
    is_remote,
    require_space,
)
from sit_jax.files import sha256 as hash_file

HUB = "https://huggingface.co"  # or a mirror of it, in HF_ENDPOINT


@dataclasses.dataclass(frozen=True)
class PretrainedFile:
    """A published file of weights.

    Attributes:
        source: a URL, or hf:owner/repo/file.
        licence: of the file, in words.
        family: whose weights: sit, dit, mdt, mdtv2, vae, inception.
        size: bytes.
        sha256: of the file.
    """

    source: str
    licence: str
    family: str | None = None
    size: int | None = None
    sha256: str | None = None

    @property
    def on_hub(self) -> tuple[str, str] | None:
        """Repository and file name on the Hugging Face Hub; None of a plain URL."""
        if not self.source.startswith("hf:"):
            return None
        owner, repo, *path = self.source.removeprefix("hf:").split("/")
        return f"{owner}/{repo}", "/".join(path)

    @property
    def url(self) -> str:
        if self.on_hub is None:
            return self.source
        repo, name = self.on_hub
        return f"{_endpoint()}/{repo}/resolve/main/{urllib.parse.quote(name)}"

    @property
    def cache_path(self) -> Path:
        return cache_dir() / self.source.partition(":")[2].strip("/")


FID = "https://github.com/mseitzer/pytorch-fid/releases/download"
DIT = "https://dl.fbaipublicfiles.com/DiT/models"
NO_COMMERCE = "CC BY-NC 4.0, not for commercial use"
# SiT's files moved from Dropbox to the Hub (willisma/SiT#42). No sizes or hashes are
# published for SiT, DiT and MDT apart from the Hub's own; sd-vae-ft-mse's are those of
# its revision 31f26fd, inception's as several public repositories quote them.
PRETRAINED = {
    "sit-xl2-256": PretrainedFile(
        "hf:nyu-visionx/SiT-collections/SiT-XL-2-256.pt", "MIT", "sit"
    ),
    "dit-xl2-256": PretrainedFile(f"{DIT}/DiT-XL-2-256x256.pt", NO_COMMERCE, "dit"),
    "dit-xl2-512": PretrainedFile(f"{DIT}/DiT-XL-2-512x512.pt", NO_COMMERCE, "dit"),
    "mdt-xl2": PretrainedFile(
        "hf:shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt", "Apache-2.0", "mdt"
    ),
    "mdtv2-xl2": PretrainedFile(
        "hf:shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt", "Apache-2.0", "mdtv2"
    ),
    "sd-vae-ft-mse": PretrainedFile(
        "hf:stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors",
        "MIT",
        "vae",
        size=334_643_276,
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "sd-vae-ft-ema": PretrainedFile(
        "hf:stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors",
        "MIT",
        "vae",
    ),
    "inception": PretrainedFile(
        f"{FID}/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "Apache-2.0",
        "inception",
        size=95_628_359,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
}


def find(name: str | Path) -> PretrainedFile | None:
    """Returns the entry of a name, or of hf:owner/repo/file; None of a path."""
    name = str(name)
    if name in PRETRAINED:
        return PRETRAINED[name]
    if not name.startswith("hf:"):
        return None
    parts = name.removeprefix("hf:").split("/")
    if len(parts) < 3 or not all(re.fullmatch(r"(?!\.+$)[\w.+ -]+", p) for p in parts):
        raise UserError(f"{name!r} is not hf:owner/repo/file")
    return PretrainedFile(name, f"see {HUB}/{parts[0]}/{parts[1]}")


def cache_dir() -> Path:
    """Returns the folder that downloads are kept in."""
    folder = os.environ.get("SIT_JAX_CACHE") or "~/.cache/sit_jax"
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder for ~/.cache/sit_jax; name a folder in "
            "SIT_JAX_CACHE"
        ) from error


def fetch(name: str | Path) -> Path:
    """Returns the path of a published file, downloaded if it is not there.

    A path stays a path; a bucket's files are copied here, its folders are not.

    Raises:
        UserError: the download failed, or its size or sha256 is another than published.
    """
    release = find(name)
    if release is None:
        path = as_path(name)
        return _copy_from_bucket(path) if is_remote(path) and path.is_file() else path
    if Path(name).exists():
        raise UserError(
            f"{name} is the name of a release, and something here is called so; "
            f"./{name} is what is here"
        )
    path = release.cache_path
    if not path.exists():
        print(f"{name}: from {release.url}, licence {release.licence}", file=sys.stderr)
        _download(release, path)
    elif release.size not in (None, path.stat().st_size):
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, {name} has {release.size}; "
            "remove it to load it again"
        )
    return path


def _download(release, path):
    import pooch

    size, sha256 = release.size, release.sha256
    pooch.get_logger().setLevel("WARNING")
    try:
        if release.on_hub is None:
            require_space(path, size or 0)
            pooch.retrieve(
                release.url,
                known_hash=sha256,
                fname=path.name,
                path=path.parent,
                progressbar=sys.stderr.isatty(),
            )
            return
        size, sha256 = _download_from_hub(release, path)
    except UserError:
        raise
    except Exception as error:  # of requests, httpx, urllib3, pooch and the Hub
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{release.url} was not loaded ({reason}); load it elsewhere and put it at "
            f"{path}"
        ) from error
    loaded = path.stat().st_size, hash_file(path)
    if loaded != (size or loaded[0], sha256 or loaded[1]):
        path.unlink()
        raise UserError(
            f"{release.url} is another file than expected: {loaded[0]} bytes of sha256 "
            f"{loaded[1]}, not {size} of {sha256}; what was loaded is removed"
        )


def _download_from_hub(release, path):
    """Downloads a file and returns the size and sha256 that it must have."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repo, name = release.on_hub
    url = hf_hub_url(repo, name, endpoint=_endpoint())
    about = get_hf_file_metadata(url, endpoint=_endpoint())
    is_sha = re.fullmatch("[0-9a-f]{64}", about.etag or "")  # of large files only
    size = release.size or about.size
    require_space(path, size or 0)
    folder = path.parents[name.count("/")]
    hf_hub_download(repo, name, local_dir=folder, endpoint=_endpoint())
    return size, release.sha256 or (about.etag if is_sha else None)


def _endpoint():
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def _copy_from_bucket(path):
    """Returns this machine's copy of a bucket's file; of each version another one."""
    if re.fullmatch(r"model\d+\.pt", path.name):
        raise UserError(f"{path} is one of several files; copy its folder to a disk")
    version = str(file_version(path)[1])
    name = str(path).removeprefix("gs://")
    here = cache_dir() / "gs" / name / version / path.name
    if not here.exists():
        print(f"{path}: copied to {here}", file=sys.stderr)
        require_space(here, file_size(path))
        with atomic_write(here) as name:
            files.download(path, name)
    return here
