"""Chooses the classes to draw: random, in equal numbers, listed, or from a file."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from sit_jax.diffusion import rng
from sit_jax.errors import UserError
from sit_jax.files import local_path
from sit_jax.sampling.outputs import load_npy


def make_labels(
    word: str | None, number: int | None, classes: int, seed: int
) -> Int[np.ndarray, " n"]:
    """Returns the label of each image, int32.

    Args:
        word: "random" or None (each image's label from the seed and its number),
            "balanced" (0, 1, 2, ... over and over), classes "207,360" (each gets an
            equal share, in a row), or a file of whole numbers, .npy or text.
        number: how many images; None: one for each label, or for each class.
        classes: how many classes there are.
        seed: of random labels.

    Raises:
        UserError: a label is no class, or the number does not fit the labels.
    """
    if number is not None and number < 1:
        raise UserError(f"--num {number}: at least 1")
    if word in (None, "random"):
        keys = rng.image_keys(seed, np.arange(1 if number is None else number))
        return np.asarray(rng.sample_labels(keys, classes), np.int32)
    if word == "balanced":
        count = classes if number is None else number
        return np.arange(count, dtype=np.int32) % classes
    if all(part.strip().isdecimal() for part in word.split(",")):
        listed = [int(part) for part in word.split(",")]
        return _spread(_checked(listed, classes, "--labels"), number)
    if Path(word).suffix in (".npy", ".txt") or Path(word).exists():
        found = _checked(_read(local_path(word)), classes, f"--labels {word}")
        if number not in (None, len(found)):
            raise UserError(f"--num {number}, but {word} has {len(found)} labels")
        return found
    raise UserError(
        f"--labels {word!r}: random, balanced, classes such as 207,360, or a file"
    )


def _spread(listed, number):
    number = len(listed) if number is None else number
    if number % len(listed):
        raise UserError(
            f"--num {number} is not divisible by the {len(listed)} labels; "
            "each label gets as many images"
        )
    return np.repeat(listed, number // len(listed))


def _read(path):
    try:
        if path.suffix == ".npy":
            found = load_npy(path)
        else:
            found = np.loadtxt(path, dtype=np.int64, ndmin=1)
    except UserError as error:
        raise UserError(f"--labels: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no list of whole numbers"
        raise UserError(f"--labels {path}: {reason}") from error
    if found.dtype.kind not in "iu":
        raise UserError(f"--labels {path}: no list of whole numbers")
    return found.ravel()


def _checked(found, classes, where):
    found = np.asarray(found, np.int64)
    wrong = found[(found < 0) | (found >= classes)]
    if len(found) == 0:
        raise UserError(f"{where} has no labels")
    if len(wrong):
        raise UserError(
            f"{where}: {wrong[0]} is not a class; there are 0..{classes - 1}"
        )
    return found.astype(np.int32)
