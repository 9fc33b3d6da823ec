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
        listed = _check_labels(list(map(int, word.split(","))), classes, "--labels")
        number = len(listed) if number is None else number
        if number % len(listed):
            raise UserError(
                f"--num {number} is not divisible by the {len(listed)} labels; "
                "each label gets as many images"
            )
        return np.repeat(listed, number // len(listed))
    if Path(word).suffix in (".npy", ".txt") or Path(word).exists():
        labels = _check_labels(
            _read_labels(local_path(word)), classes, f"--labels {word}"
        )
        if number not in (None, len(labels)):
            raise UserError(f"--num {number}, but {word} has {len(labels)} labels")
        return labels
    raise UserError(
        f"--labels {word!r}: random, balanced, classes such as 207,360, or a file"
    )


def _read_labels(path):
    try:
        if path.suffix == ".npy":
            labels = load_npy(path)
        else:
            labels = np.loadtxt(path, dtype=np.int64, ndmin=1)
    except UserError as error:
        raise UserError(f"--labels: {error}") from error
    except OSError as error:
        raise UserError(f"--labels {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"--labels {path}: no list of whole numbers") from error
    if labels.dtype.kind not in "iu":
        raise UserError(f"--labels {path}: no list of whole numbers")
    return labels.ravel()


def _check_labels(labels, classes, source):
    labels = np.asarray(labels, np.int64)
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(labels) == 0:
        raise UserError(f"{source} has no labels")
    if len(wrong):
        raise UserError(
            f"{source}: {wrong[0]} is not a class; there are 0..{classes - 1}"
        )
    return labels.astype(np.int32)
