"""Data: sources hold records, the loader shuffles them and puts batches on devices.

Importing it does not import JAX, so that code which only reads files starts quickly.
"""

from sit_jax.data.loader import batches
from sit_jax.data.sources import DataSource, Digits, LatentFolder, Synthetic

__all__ = ["DataSource", "Digits", "LatentFolder", "Synthetic", "batches"]
