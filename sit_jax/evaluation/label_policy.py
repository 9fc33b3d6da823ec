"""How the labels of a set of samples were chosen, as its records tell."""

import numpy as np

from sit_jax.files import read_json
from sit_jax.sampling.array_files import ArrayFile
from sit_jax.sampling.outputs import manifest_path


def policy(labels, classes):
    """How labels were chosen, to judge by them: balanced, listed or random."""
    if len(labels) == 0:
        return "none"
    counts = np.bincount(labels, minlength=classes)
    if np.ptp(counts) <= 1 and len(labels) >= classes:
        return "balanced"
    runs = 1 + int((np.diff(labels) != 0).sum())
    held = counts[counts > 0]
    return "listed" if runs == len(held) and np.ptp(held) == 0 else "random"


def decided(path, count):
    """-> labels int [count] of samples, if their numbers were decided; else None.

    From the manifest beside the samples, or an .npz's arr_1 where there is none.
    """
    labels, classes = _recorded(path)
    if len(labels) != count or labels.dtype.kind not in "iu" or labels.min() < 0:
        return None
    return None if policy(labels, classes or labels.max() + 1) == "random" else labels


def _recorded(path):
    """-> labels, and the number of classes or 0."""
    beside = manifest_path(path)
    if beside.is_file():
        manifest = read_json(beside)
        labels = manifest.get("job", {}).get("labels", [])
        return np.asarray(labels).reshape(-1), classes_of(manifest)
    if path.is_file() and "arr_1" in (file := ArrayFile(path)):
        return file.array("arr_1").reshape(-1), 0
    return np.zeros(0, int), 0


def classes_of(manifest):
    """Of the network, by a manifest; 0 if it does not say."""
    model = manifest.get("job", {}).get("config", {}).get("model", {})
    return int(model.get("classes", 0) or 0)
