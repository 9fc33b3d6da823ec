"""A classifier of the 8x8 digits: for them, what Inception is for photographs.

Its hidden layer gives features for a Fréchet distance without a download, and its
answers tell how many samples show the digit that was asked for.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int, UInt8

from sit_jax.data.sources import Digits
from sit_jax.errors import UserError
from sit_jax.evaluation.fid import Gaussian, frechet_distance

SHAPE = (8, 8, 1)
WIDTH = 64  # features


class DigitFeatures:
    """Takes the place of a FeatureExtractor; trained on the real training digits.

    The first one takes some seconds to make. Of images uint8 [n, 8, 8, C] the first
    channel counts.
    """

    batch_size, is_inception = 500, False
    pipeline = {"network": f"{WIDTH} units on scikit-learn's digits, seed 0"}

    def __init__(self):
        self._classifier = _train_classifier()

    def __call__(
        self, batches: Iterable[UInt8[np.ndarray, "n 8 8 c"]]
    ) -> Iterator[dict[str, Float[np.ndarray, "n d"]]]:
        """Yields the features of batches, by the name "pool"."""
        for images in batches:
            yield {"pool": self.hidden(images).astype(np.float32)}

    def widths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Returns how many numbers the features of images [H, W, C] have, by name."""
        _require_digits(shape)
        return {"pool": WIDTH}

    def hidden(self, images: UInt8[np.ndarray, "n 8 8 c"]) -> Float[np.ndarray, "n d"]:
        """Returns the classifier's hidden layer."""
        weights, bias = self._classifier.coefs_[0], self._classifier.intercepts_[0]
        return np.maximum(_rows(images) @ weights + bias, 0)

    def predict(self, images: UInt8[np.ndarray, "n 8 8 c"]) -> Int[np.ndarray, " n"]:
        """Returns the digits that images look like."""
        return self._classifier.predict(_rows(images))


def digit_figures(
    images: UInt8[np.ndarray, "n 8 8 c"], labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """Compares samples with held-out digits, beside the same figures of real digits.

    Args:
      images: samples.
      labels: the digits that were asked for.

    Returns:
      Shares that the classifier recognises, and Fréchet distances in its features.
    """
    train, held_out = Digits(train=True), Digits(train=False)
    extractor = DigitFeatures()
    target = Gaussian.of(extractor.hidden(held_out.images))
    count = min(len(images), len(train))  # as many real ones, for the same bias
    rows = np.random.default_rng(0).permutation(len(train))[:count]
    distance = lambda x: frechet_distance(Gaussian.of(extractor.hidden(x)), target)
    recognised = lambda x, y: float(np.mean(extractor.predict(x) == y))
    return {
        "samples": len(images),
        "held_out": len(held_out),
        "real": count,
        "samples_recognised": recognised(images, labels),
        "real_recognised": recognised(held_out.images, held_out.labels),
        "frechet_samples": distance(images),
        "frechet_real": distance(train.images[rows]),
    }


@functools.cache
def _train_classifier():
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    digits = Digits(train=True)
    classifier = MLPClassifier((WIDTH,), alpha=0.1, max_iter=200, random_state=0)
    # products so small only wait for each other's threads: 60 s on busy cores, with one
    # thread 4 s and the same bits
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # 200 rounds are not all it could have
        return classifier.fit(_rows(digits.images), digits.labels)


def _rows(images):
    _require_digits(images.shape[1:])
    return images[..., 0].reshape(len(images), -1) / 255.0


def _require_digits(shape):
    if tuple(shape[:2]) != SHAPE[:2]:
        raise UserError(f"images are {tuple(shape)}; digits are (8, 8, 1)")
