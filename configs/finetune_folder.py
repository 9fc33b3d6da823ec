"""SiT-XL/2 on the classes of a folder of images, from released weights.

--config.source.path=DIR --init sit-xl2-256, or any --init of another number of classes.
For 512 pixels: --config.source.size=512 --config.shape='(64, 64, 4)'.
"""

from sit_jax.config import spec
from sit_jax.data.folders import ImageFolder
from sit_jax.recipes import sit


def get_config():
    c = sit()
    c.source = spec(ImageFolder, path="data/photographs", size=256)
    c.count_classes = True
    c.vae = "sd-vae-ft-mse"
    c.batch_size = 32
    c.ema_decay = 0.999
    c.steps = 20_000
    c.save_every = 1_000
    c.sample_every = 1_000
    return c
