"""MDT of any size on ImageNet 256: --config configs/mdt.py:S/2; version 2: S/2+v2."""

from sit_jax.recipes import from_variant, mdt


def get_config(variant="XL/2"):
    return from_variant(mdt, variant)
