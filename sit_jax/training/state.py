"""The state of training, and the moving averages (EMA) of the weights in it.

With one decay the EMA is a tree like the weights; with a tuple of decays a dict of such
trees by the decays' names, "0.9999". In a checkpoint the first is the item `ema`, which
is sampled from; the others are `ema_0.999` and so on.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from sit_jax.adapters.weights import split_trainable
from sit_jax.errors import UserError
from sit_jax.typing import Params

Decay: TypeAlias = float | tuple[float, ...]
EMA: TypeAlias = Any  # Params, or {name of a decay: Params}


class TrainState(struct.PyTreeNode):
    """All that training changes from step to step."""

    step: Int[Array, ""]  # batches seen
    params: Params
    ema: EMA
    opt_state: optax.OptState
    skipped_steps: Int[Array, "2"]  # steps without effect: in all, and in a row
    timestep_sampler_state: Any = ()
    frozen_params: Params = struct.field(default_factory=dict)  # that are not trained

    @classmethod
    def create(
        cls,
        params: Params,
        optimizer: optax.GradientTransformation,
        *,
        ema_decay: Decay = 0.9999,
        timestep_sampler_state: Any = (),
    ) -> "TrainState":
        """Returns the state of step 0.

        Args:
          params: of the network; adapters may be part of them, then only these train.
          optimizer: whose state is initialized.
          ema_decay: of the moving average, which starts as a copy of the weights.
          timestep_sampler_state: what the choice of times remembers at first.
        """
        params, frozen_params = split_trainable(params)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=init_ema(params, ema_decay),
            opt_state=optimizer.init(params),
            skipped_steps=jnp.zeros(2, jnp.int32),
            timestep_sampler_state=timestep_sampler_state,
            frozen_params=frozen_params,
        )

    @classmethod
    def init(
        cls,
        model: Any,
        optimizer: optax.GradientTransformation,
        shape: tuple[int, int, int],
        key: Array,
        *,
        ema_decay: Decay = 0.9999,
        timestep_sampler_state: Any = (),
    ) -> "TrainState":
        """Returns the state of step 0 with fresh weights, for data of (h, w, c)."""
        return cls.create(
            init_params(model, shape, key),
            optimizer,
            ema_decay=ema_decay,
            timestep_sampler_state=timestep_sampler_state,
        )


def init_params(model: Any, shape: tuple[int, int, int], key: Array) -> Params:
    """Returns freshly drawn parameters of a model for data of this (h, w, c)."""
    x, t, labels = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, int)
    return model.init(key, x, t, labels)["params"]


def check_ema_decay(decay: Decay) -> None:
    """Refuses decays outside 0..1, none at all, and one twice."""
    for rate in _decays(decay):
        if not 0 <= rate <= 1:
            raise UserError(f"ema_decay is {rate}; it must be in [0, 1]")
    if len(set(_names(decay))) != len(_decays(decay)) or not _decays(decay):
        raise UserError(f"ema_decay is {decay}; give one rate, or several different")


def init_ema(params: Params, decay: Decay) -> EMA:
    """Returns copies of the weights, in memory of their own: the state is donated."""
    copy = lambda: jax.tree.map(jnp.copy, params)
    if not isinstance(decay, tuple):
        return copy()
    return {name: copy() for name in _names(decay)}


def update_ema(ema: EMA, params: Params, decay: Decay) -> EMA:
    """Returns the averages one step later."""
    if not isinstance(decay, tuple):
        return optax.incremental_update(params, ema, 1 - decay)
    pairs = zip(_names(decay), decay, strict=True)
    return {name: update_ema(ema[name], params, rate) for name, rate in pairs}


def sampled_ema(ema: EMA, decay: Decay) -> Params:
    """Returns the average that is sampled from: the first."""
    return ema[_names(decay)[0]] if isinstance(decay, tuple) else ema


def split_ema(ema: EMA, decay: Decay) -> dict[str, Params]:
    """Returns {item of a checkpoint: tree}."""
    if not isinstance(decay, tuple):
        return {"ema": ema}
    items = zip(ema_item_names(decay), _names(decay), strict=True)
    return {item: ema[name] for item, name in items}


def join_ema(items: dict[str, Params], decay: Decay) -> EMA:
    """Returns the averages of what split_ema made; items may hold more."""
    if not isinstance(decay, tuple):
        return items["ema"]
    names = zip(ema_item_names(decay), _names(decay), strict=True)
    return {name: items[item] for item, name in names}


def ema_item_names(decay: Decay) -> tuple[str, ...]:
    """Returns the items of a checkpoint, the one that is sampled from first."""
    return ("ema", *(f"ema_{name}" for name in _names(decay)[1:]))


def _names(decay: Decay) -> tuple[str, ...]:
    return tuple(str(float(rate)) for rate in _decays(decay))


def _decays(decay: Decay) -> tuple[float, ...]:
    return decay if isinstance(decay, tuple) else (decay,)
