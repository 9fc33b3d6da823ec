"""SiT-B/2 that predicts the noise, weighted as if it were the velocity."""

from configs.sit_b2_noise import get_config as sit_b2_noise
from sit_jax.diffusion.loss_weights import velocity_weight


def get_config():
    c = sit_b2_noise()
    c.process.weight = velocity_weight
    return c
