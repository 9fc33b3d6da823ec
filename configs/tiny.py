"""Ten seconds on a CPU: a small SiT on noise, to see a run start, save and go on."""

from sit_jax.config import spec
from sit_jax.models.codec import Pixels
from sit_jax.recipes import sit
from sit_jax.samplers.fixed_ode import FixedStepODE, euler


def get_config():
    c = sit()
    c.shape = (8, 8, 3)
    c.model.update(depth=2, width=32, heads=4, classes=10, remat="none")
    c.codec = spec(Pixels)
    c.synthetic = True
    c.batch_size = 16
    c.ema_decay = 0.9
    c.steps = 50
    c.log_every = 10
    c.save_every = 20
    c.sample_every = 50
    c.preview = 10
    c.sampler = spec(FixedStepODE, method=euler, steps=8)
    return c
