"""SiT-B/2 that predicts the noise, weighted for a bound of the likelihood."""

from configs.sit_b2_noise import get_config as sit_b2_noise
from sit_jax.diffusion.loss_weights import likelihood_weight


def get_config():
    c = sit_b2_noise()
    c.process.weight = likelihood_weight
    return c
