"""From numbers to bytes: how the originals' sampling scripts make pictures.

Reference statistics of samples depend on the rule, so a manifest names it. In float32
whatever comes in: bfloat16 has no 256 levels.
"""

import jax.numpy as jnp


def to_uint8(x):
    """[-1, 1] -> uint8 of the same shape, by the rule of DiT's and SiT's scripts.

    They clamp 127.5 x + 128 to 0..255 and truncate.
    """
    return jnp.clip(127.5 * x.astype(jnp.float32) + 128, 0, 255).astype(jnp.uint8)


def to_uint8_darker(x):
    """The rule of MDT's scripts: (x + 1) 127.5, half a level less, truncated too."""
    return jnp.clip((x.astype(jnp.float32) + 1) * 127.5, 0, 255).astype(jnp.uint8)


ROUNDINGS = {"brighter": to_uint8, "darker": to_uint8_darker}


def name(rule):
    """The word for a rule: of ROUNDINGS, or the function's own name."""
    return next((n for n, known in ROUNDINGS.items() if known is rule), rule.__name__)
