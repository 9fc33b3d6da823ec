"""SiT-XL/2 on ImageNet 256: linear path, velocity, 7M steps of 256 images.

FID-50K 2.06 (SiT's README). Data: a folder of cached latents, data/imagenet256. Where
its fields come from: sit_jax/recipes.py; what they mean: train.py --print-config.
"""

from sit_jax.recipes import sit


def get_config():
    return sit("XL/2")
