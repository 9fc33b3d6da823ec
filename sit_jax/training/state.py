"""The state of training, and the moving averages (EMA) of the weights in it."""

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


class TrainState(struct.PyTreeNode):
    """All that training changes from step to step."""

    step: Int[Array, ""]  # batches seen
    params: Params
    ema: dict[str, Params]  # by ema_rates(); "ema" is sampled from
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


def init_params(model: Any, shape: tuple[int, int, int], key: Array) -> Params:
    """Returns freshly drawn parameters of a model for data of this (h, w, c)."""
    x, t, labels = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, int)
    return model.init(key, x, t, labels)["params"]


def ema_rates(decay: Decay) -> dict[str, float]:
    """Returns {item of a checkpoint: decay of that EMA}.

    The first is `ema`, which is sampled from; the others are called `ema_0.999`.

    Raises:
      UserError: a decay is outside 0..1, there is none, or one twice.
    """
    rates = tuple(map(float, decay if isinstance(decay, tuple) else (decay,)))
    for rate in rates:
        if not 0 <= rate <= 1:
            raise UserError(f"ema_decay is {rate}; it must be in [0, 1]")
    if not rates or len(set(rates)) < len(rates):
        raise UserError(f"ema_decay is {decay}; give one rate, or several different")
    return {"ema": rates[0], **{f"ema_{rate}": rate for rate in rates[1:]}}


def init_ema(params: Params, decay: Decay) -> dict[str, Params]:
    """Returns copies of the weights, in memory of their own: the state is donated."""
    return {name: jax.tree.map(jnp.copy, params) for name in ema_rates(decay)}


def update_ema(
    ema: dict[str, Params], params: Params, decay: Decay
) -> dict[str, Params]:
    """Returns the averages one step later."""
    return {
        name: optax.incremental_update(params, ema[name], 1 - rate)
        for name, rate in ema_rates(decay).items()
    }
