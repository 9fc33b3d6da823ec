"""SiT-B/2 that predicts the score, weighted as if it were the velocity."""

from configs.sit_b2_score import get_config as sit_b2_score
from sit_jax.diffusion.loss_weights import velocity_weight


def get_config():
    c = sit_b2_score()
    c.process.weight = velocity_weight
    return c
