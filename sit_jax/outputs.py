"""What sample.py writes: a sheet, arrays, or a folder of pictures, by the name's end.

Everything appears by rename, so that an output is whole or not there.
"""

import os
from pathlib import Path

import numpy as np

from sit_jax.drafts import draft
from sit_jax.errors import UserError
from sit_jax.pictures import save_png, sheet

KINDS = (".png", ".npy", ".npz")


def check(path, overwrite):
    """-> Path; refuses what exists already and endings that mean nothing."""
    is_folder = str(path).endswith(("/", os.sep))
    path = Path(path).expanduser()
    if not is_folder and path.suffix not in KINDS:
        raise UserError(
            f"--out {path}: write a name ending in {', '.join(KINDS)}, or a folder/"
        )
    taken = any(path.iterdir()) if is_folder and path.is_dir() else path.exists()
    if taken and not overwrite:
        raise UserError(f"--out {path} exists; --overwrite replaces it")
    folder = path if is_folder else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {path}: {folder} is not writable")
    return path


def wants_pictures(path):
    return path.suffix != ".npy"


def write(path, data, images, labels, columns):
    """data float32 [N, H, W, C] -> .npy; images uint8 [N, h, w, c] -> the others."""
    if path.suffix == ".npy":
        with draft(path) as name:
            np.save(name, np.asarray(data, np.float32))
    elif path.suffix == ".npz":
        with draft(path) as name:
            np.savez(name, arr_0=images, arr_1=np.asarray(labels))
    elif path.suffix == ".png":
        save_png(path, sheet(images, columns))
    else:
        for old in path.glob("[0-9]*.png"):
            old.unlink()  # of more images than there are now
        for i, image in enumerate(images):
            save_png(path / f"{i:06d}.png", image)


def manifest_path(path):
    """Where the record of an output stands: beside a file, inside a folder."""
    if path.suffix in KINDS:
        return path.with_name(f"{path.name}.manifest.json")
    return path / "manifest.json"
