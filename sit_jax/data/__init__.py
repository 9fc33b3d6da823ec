"""Data: sources hold records, batches put them on the devices.

Importing it does not import JAX, so that a process that only reads need not start it.
"""

from sit_jax.data.feed import batches
from sit_jax.data.sources import Digits, LatentFolder, Synthetic

__all__ = ["Digits", "LatentFolder", "Synthetic", "batches"]
