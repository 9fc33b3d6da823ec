"""SiT-B/2 that predicts the noise."""

from configs.sit_b2 import get_config as sit_b2
from sit_jax.diffusion import predictions


def get_config():
    c = sit_b2()
    c.process.predicts = predictions.noise
    return c
