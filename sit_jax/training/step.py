"""One training step. Everything random in it follows from (key, step)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from sit_jax.checkpoint import leaves_by_name
from sit_jax.diffusion.rng import StepKeys
from sit_jax.diffusion.timesteps import quartile_means
from sit_jax.models.codec import codec_sample
from sit_jax.training.objectives import (
    StepInputs,
    accumulate_gradients,
    make_passes,
    total_loss,
    value_and_grad,
)
from sit_jax.training.state import Decay, TrainState, update_ema
from sit_jax.typing import Params, Process, TimestepSampler

Metrics = dict[str, Array]


def make_train_step(
    model: Any,
    process: Process,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: Decay = 0.9999,
    label_dropout: float = 0.1,
    microbatches: int = 1,
    timestep_sampler: TimestepSampler | None = None,
    log_quartiles: bool = False,
    shard_gradients: Callable[[Params], Params] = lambda grads: grads,
) -> Callable[
    [TrainState, Any, Mapping[str, Array], Array], tuple[TrainState, Metrics]
]:
    """Returns train_step(state, codec, batch, key) -> (state, metrics).

    batch is {"latent" | "moments" | "image": [b, ...], "label": int [b]}. A step whose
    loss or gradient is not finite leaves the weights as they were; it is counted, and
    metrics["bad"] is the index of the first such tensor in tensor_names(state).

    Args:
      model: the network.
      process: what it is trained on.
      optimizer: an optax transformation.
      ema_decay: of the moving average, or several.
      label_dropout: share of labels that are replaced by the null label.
      microbatches: parts that the batch is gone through in, for the same gradient.
      timestep_sampler: chooses times; None: the process draws them uniformly.
      log_quartiles: losses are also given by quarters of the times.
      shard_gradients: constrains where gradients live, see parallel/.
    """

    def train_step(
        state: TrainState, codec: Any, batch: Mapping[str, Array], key: Array
    ) -> tuple[TrainState, Metrics]:
        keys = StepKeys.at(key, state.step)
        data = codec_sample(codec, keys.codec, batch)  # (b, h, w, c)
        sampler_state, weights = state.timestep_sampler_state, None
        if timestep_sampler is None:
            t = process.sample_times(keys.times, len(data))
        else:
            t, weights = timestep_sampler.sample(
                process, keys.times, sampler_state, len(data)
            )
        passes = make_passes(model, keys, batch["label"], data.shape, label_dropout)
        inputs = StepInputs(data, t, weights, passes)

        grad_fn = accumulate_gradients(
            partial(value_and_grad, model, process, state.frozen_params), microbatches
        )
        grads, terms, rows = grad_fn(state.params, inputs)
        grads = shard_gradients(grads)
        loss, norm = total_loss(passes, terms), optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        if timestep_sampler is not None:
            row_losses = total_loss(passes, rows)
            sampler_state = timestep_sampler.update(sampler_state, t, row_losses)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            ema=update_ema(state.ema, params, ema_decay),
            opt_state=opt_state,
            skipped_steps=_count_skipped(state.skipped_steps, is_finite),
            timestep_sampler_state=sampler_state,
        )
        new_state = _keep_if_finite(is_finite, new_state, state)

        tensors = data, state.params, grads
        bad = jax.lax.cond(is_finite, lambda _: -1, _first_not_finite, tensors)
        skipped = new_state.skipped_steps
        metrics = terms | {"grad_norm": norm, "bad": bad, "skipped": skipped}
        if log_quartiles:
            metrics |= quartile_means(rows, t, process.max_time)
        return new_state, metrics

    return train_step


def tensor_names(state: TrainState) -> list[str]:
    """Returns names for metrics["bad"]: the batch, the parameters, their gradients.

    The last stands for -1: all of these are finite, but the loss or a norm is not.
    """
    names = list(leaves_by_name(state.params))
    gradients = [f"gradient of {name}" for name in names]
    return ["the batch", *names, *gradients, "the loss or the norm of its gradient"]


def _keep_if_finite(
    is_finite: Bool[Array, ""], new: TrainState, old: TrainState
) -> TrainState:
    """Returns the new state, with what the optimizer changed only if it is finite."""
    kept = jax.tree.map(partial(jnp.where, is_finite), new, old)
    return kept.replace(
        step=new.step,
        skipped_steps=new.skipped_steps,
        frozen_params=new.frozen_params,
    )


def _count_skipped(
    skipped_steps: Int[Array, "2"], is_finite: Bool[Array, ""]
) -> Int[Array, "2"]:
    """Returns how many steps had no effect: in all, and in a row."""
    total, streak = skipped_steps
    return jnp.where(is_finite, jnp.stack([total, 0]), jnp.stack([total, streak]) + 1)


def _first_not_finite(tensors: Any) -> Int[Array, ""]:
    """Returns the index of the first tensor that is not finite, -1 without one."""
    # 0 * inf is not a number; compiles to fewer kernels than isfinite(leaf).all()
    zero = lambda leaf: jnp.sum(0 * leaf)
    bad = jnp.isnan(jnp.stack([zero(leaf) for leaf in jax.tree.leaves(tensors)]))
    return jnp.where(bad.any(), jnp.argmax(bad), -1)
