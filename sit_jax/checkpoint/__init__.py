"""Checkpoints: step directories of the items `params`, `ema`, `opt_state`, `meta`.

There may be averages at other rates, `ema_0.999`, and what the choice of times learns
from, `losses`. Ported ones may have `constants`: what a torch file holds beside the
parameters.

Only this folder knows Orbax. A step appears under its number when it is complete, so
what a kill interrupts is never mistaken for a checkpoint, and it brings the sums of its
files, which are compared before any of them is used. `meta` is JSON: the config, the
step and what else describes the weights; it is enough to build the model.
"""

import sit_jax.opening

from sit_jax.checkpoint.folder import find, items, steps
from sit_jax.checkpoint.newest import newest_whole
from sit_jax.checkpoint.reading import leaves, load, read_meta
from sit_jax.checkpoint.saving import Checkpoints
from sit_jax.checkpoint.sums import has_sums, identity
from sit_jax.checkpoint.trees import compare, named
from sit_jax.checkpoint.whole import Damaged, require_whole

__all__ = [
    "Checkpoints",
    "Damaged",
    "compare",
    "find",
    "has_sums",
    "identity",
    "items",
    "leaves",
    "load",
    "named",
    "newest_whole",
    "read_meta",
    "require_whole",
    "steps",
]
