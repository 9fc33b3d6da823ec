"""DiT of any size on ImageNet: --config configs/dit.py:B/4, S/8, XL/2+512 ..."""

from sit_jax.recipes import dit, from_variant


def get_config(variant="XL/2"):
    return from_variant(dit, variant)
