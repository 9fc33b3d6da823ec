"""Checkpoints: numbered steps in a folder, written by Orbax, with checksums.

Only this package imports Orbax. A step holds the items `params`, `ema`, `opt_state` and
`meta`. It may hold averages at other rates (`ema_0.999`), the state of a timestep
sampler (`losses`) and, if it was ported, constants of the torch file (`constants`).
`meta` is JSON: the config, the step, and whatever else is needed to build the model.
"""

# ruff: noqa: F401 - what other packages use of this one
from sit_jax.checkpoint.checksums import has_checksums, step_digest
from sit_jax.checkpoint.store import (
    Checkpoints,
    DamagedCheckpoint,
    find_step,
    items,
    iter_leaves,
    leaves_by_name,
    load,
    read_meta,
    require_intact,
    require_same_shapes,
    restore_newest,
    save_step,
    steps,
)
