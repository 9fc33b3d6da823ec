"""SiT of any size on ImageNet: --config configs/sit.py:B/4, L/2, XL/2+512 ...

Words after the size: 512; gvp, vp (paths); noise, score (predictions);
velocity-weight, likelihood-weight (of the loss); heun, sde (samplers, guidance 1.5).
"""

from sit_jax.recipes import from_variant, sit


def get_config(variant="XL/2"):
    return from_variant(sit, variant)
