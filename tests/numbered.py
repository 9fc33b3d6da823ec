"""Sources of numbered records, to see which ones batches hold."""

import time

import jax
import numpy as np

from sit_jax.data import batches
from sit_jax.parallel.mesh import make_mesh


class Numbered:
    """Record i says i, so that a batch shows which records it is made of."""

    shape, classes = (1, 1, 1), 3

    def __init__(self, length, delay=0.0):
        self.length, self.delay = length, delay

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        time.sleep(self.delay)
        latent = np.full(self.shape, i, np.float32)
        return {"latent": latent, "label": np.int32(i % self.classes)}


class Single(Numbered):
    """One record, to be spoilt by a test."""

    def __init__(self, **record):
        super().__init__(1)
        self.record = {"latent": np.zeros((1, 1, 1), np.float32), "label": 0} | record

    def __getitem__(self, i):
        return {k: v for k, v in self.record.items() if v is not None}


def mesh(devices=8):
    return make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])


def ids_of(source, batch_size, steps, seed=0, first_step=0, devices=8, **settings):
    """-> record ids int [steps, batch_size]."""
    feed = batches(source, batch_size, seed, first_step, mesh(devices), **settings)
    with feed:
        drawn = [np.asarray(next(feed)["latent"]) for _ in range(steps)]
    return np.stack(drawn).reshape(steps, batch_size).astype(int)
