"""SiT-B/2 that predicts the score, weighted for a bound of the likelihood."""

from configs.sit_b2_score import get_config as sit_b2_score
from sit_jax.diffusion.loss_weights import likelihood_weight


def get_config():
    c = sit_b2_score()
    c.process.weight = likelihood_weight
    return c
