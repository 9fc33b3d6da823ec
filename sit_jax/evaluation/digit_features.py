"""A classifier of the 8x8 digits, whose hidden layer does for them what Inception does
for photographs: features for a Frechet distance, without a download.
"""

import warnings

import numpy as np

from sit_jax.data.sources import Digits
from sit_jax.errors import UserError
from sit_jax.models.inception import POOL

WIDTH = 64  # features
WIDTHS = {"inception": POOL, "digits": WIDTH}  # by names for the command line


class DigitFeatures:
    """Takes the place of a features.Extractor; trained on the real training digits.

    Some seconds at construction, then a product an image. batches: uint8 [n, 8, 8, C],
    of which the first channel is looked at.
    """

    batch_size, is_inception = 500, False
    pipeline = {"network": f"{WIDTH} units on scikit-learn's digits, seed 0"}

    def __init__(self):
        self._classifier = _trained(Digits(train=True))

    def __call__(self, batches):
        """Yields the features of batches, {"pool": float32 [n, WIDTH]}."""
        for images in batches:
            yield {"pool": self.hidden(images).astype(np.float32)}

    def widths(self, shape):
        """Numbers in the features of images [H, W, C], by name."""
        _check(shape)
        return {"pool": WIDTH}

    def hidden(self, images):
        """uint8 [n, 8, 8, C] -> [n, WIDTH]"""
        weights, bias = self._classifier.coefs_[0], self._classifier.intercepts_[0]
        return np.maximum(_flat(images) @ weights + bias, 0)

    def recognised(self, images):
        """uint8 [n, 8, 8, C] -> the digits that they look like, [n]."""
        return self._classifier.predict(_flat(images))


def _trained(digits):
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier((WIDTH,), alpha=0.1, max_iter=200, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 200 rounds are not all it could have
        return classifier.fit(_flat(digits.images), digits.labels)


def _flat(images):
    _check(images.shape[1:])
    return images[..., 0].reshape(len(images), -1) / 255.0


def _check(shape):
    if tuple(shape[:2]) != Digits.shape[:2]:
        raise UserError(f"images are {tuple(shape)}; digits are (8, 8, 1)")
