"""Images to evaluate, a toy in the Inception network's place, evaluate.py run on them.

A test file takes the fixtures as its own: network, run, sides = toy_inception.network
and so on.
"""

import json
import re
from functools import partial

import numpy as np
import pytest

from sit_jax.cli import evaluate
from sit_jax.convert.inception import InceptionWeights
from sit_jax.errors import UserError
from sit_jax.evaluation import evaluate as evaluation
from sit_jax.evaluation.features import FeatureExtractor, inception_pipeline
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.evaluation.metrics import InceptionScore, precision_recall
from sit_jax.parallel.mesh import make_mesh

ENOUGH = 210  # images, where a covariance is said to need 205
LINES = ["Inception Score: ", "FID: ", "sFID: ", "Precision: ", "Recall: "]


def toy(params, images):
    """Features of an image's pixels, 12 of them, 6 and 5."""
    flat = images.reshape(len(images), -1).astype("float32") / 255
    return {"pool": flat @ params["w"], "spatial": flat[:, :6], "logits": flat[:, 6:11]}


def weights(seed=0, released=True):
    w = np.random.default_rng(seed).standard_normal((12, 12), np.float32)
    return InceptionWeights({"w": w}, None, str(seed) * 64, released)


def extractor(weights, mesh=None, batch_size=64):
    mesh = mesh or make_mesh(data=-1, fsdp=1)
    return FeatureExtractor(
        toy, weights.params, mesh, batch_size, inception_pipeline(weights)
    )


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Puts the toy in the place of Inception; called with None it hides it."""

    known = [weights()]

    def get_extractor(name, path, batch_size):
        if known[-1] is None:
            raise UserError("no Inception weights; put x into y")
        return extractor(known[-1], batch_size=batch_size)

    monkeypatch.setattr(evaluate, "get_extractor", get_extractor)
    monkeypatch.setattr(evaluation, "MIN_IMAGES", 205)
    return known.append


@pytest.fixture
def run(call):
    return partial(call, evaluate)


def images(count, seed=0, bright=256):
    rng = np.random.default_rng(seed)
    return rng.integers(0, bright, (count, 2, 2, 3)).astype(np.uint8)


def npz(path, images, **more):
    np.savez(path, arr_0=images, **more)
    return path


@pytest.fixture
def sides(tmp_path):
    samples = npz(tmp_path / "s.npz", images(ENOUGH), arr_1=np.arange(ENOUGH))
    return samples, npz(tmp_path / "r.npz", images(ENOUGH, 1, 200))


def direct(ours, theirs):
    """The five figures of uint8 images, step by step."""
    params = weights().params
    a, b = (
        {n: np.asarray(x) for n, x in toy(params, i).items()} for i in (ours, theirs)
    )
    score = InceptionScore()
    score.add(a["logits"])
    far = lambda n: frechet_distance(Gaussian.of(a[n]), Gaussian.of(b[n]))
    precision, recall = precision_recall(a["pool"], b["pool"])
    return [score.value(), far("pool"), far("spatial"), precision, recall]


def figures(text):
    """-> the numbers of ADM's five lines, which must be there and in order."""
    lines = [line for line in text.splitlines() if line.startswith(tuple(LINES))]
    assert [line.split(": ")[0] + ": " for line in lines] == LINES
    return [float(line.split(": ")[1]) for line in lines]


def record(path):
    return json.loads(path.with_name(f"{path.name}.evaluation.json").read_text())


def refused(found, message):
    code, out, err = found
    assert code == 2 and "\n" not in err.strip(), (code, out, err)
    assert re.search(message, err), err
