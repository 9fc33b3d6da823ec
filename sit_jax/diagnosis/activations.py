"""What a network computes inside, under the names that a ladder compares."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.adapters.apply import apply_model
from sit_jax.models.layers import sincos_pos_embed_2d
from sit_jax.precision import emulation, policy

SEEN = ("time_out", "label", "patch", "head")  # modules whose output is a stage


@dataclasses.dataclass(frozen=True)
class Line:
    """All that decides the programs but the weights."""

    model: Any
    weak: Any
    process: Any
    guidance: Any
    channels: int
    steps: int
    method: Callable  # of the fixed grid
    word: str
    emulate: str | None

    def around(self, fn):
        """fn with the products that the job asked for."""
        fn = policy.with_precision(policy.get_precision(self.word), fn)
        if self.emulate is None:
            return fn
        return emulation.emulate(fn, emulation.emulated_bits(self.emulate))


@partial(jax.jit, static_argnums=0)
def activations(line, params, x, t, y):
    wanted = lambda module, method: (
        method in ("encode", "decode")
        or method == "__call__"
        and str(module.name).endswith((*SEEN, "blocks"))
    )
    see = dict(capture_intermediates=wanted, mutable=["intermediates"])
    run = lambda params, *at: apply_model(line.model, params, *at, **see)
    found = line.around(run)(params, x, t, y)[1]["intermediates"]
    return jax.tree.map(lambda a: a.astype(jnp.float32), found)


def named(found, params):
    """-> {stage: array [n, ...]} in the order of the computation."""
    first = lambda node: np.asarray(node["__call__"][0])
    patches = first(found["patch"])
    tokens = patches.reshape(len(patches), -1, patches.shape[-1])
    table = params.get("positions")
    if table is None:
        table = sincos_pos_embed_2d(patches.shape[1], patches.shape[-1])[None]
    stages = {
        "time embedding": first(found["cond"]["time_out"]),
        "label embedding": first(found["cond"]["label"]),
        "patches": tokens,
        "patches + positions": tokens + np.asarray(table),
    }
    stages |= _blocks(found, ("blocks", "in_blocks", "out_blocks", "encoder_blocks"))
    if "encode" in found:
        stages["encoder"] = np.asarray(found["encode"][0])
    stages |= _blocks(found, ("decoder_blocks",))
    if "decode" in found:
        stages["decoder"] = np.asarray(found["decode"][0])
    return stages | {"final layer": first(found["head"])}


def _blocks(found, names):
    stages = {}
    for name in names:
        if name not in found:
            continue
        node = found[name]  # of a stack of modules, or what MDT keeps of its own
        output = node["__call__"][0][0] if isinstance(node, dict) else node[0]
        word = name.removesuffix("s").replace("_", " ")
        stages |= {f"{word} {i}": layer for i, layer in enumerate(np.asarray(output))}
    return stages
