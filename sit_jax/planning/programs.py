"""The compiled programs of a config, as training, sampling and plans use them."""

import dataclasses
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from sit_jax.convert.open import base_shapes
from sit_jax.experiment import TRAINING, Experiment, build_experiment
from sit_jax.models import attention
from sit_jax.parallel import mesh as mesh_lib
from sit_jax.parallel import sharding_rules
from sit_jax.precision import policy
from sit_jax.sampling.batch_sampler import lower_batch
from sit_jax.training.state import TrainState, init_params
from sit_jax.training.step import make_train_step
from sit_jax.typing import Params

# XLA gives its library YNN sums, convolutions and single products. Without the last,
# which Eigen then takes, a training step is 2 to 4 % quicker:
# docs/evidence/performance.md.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE,"
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
}


@cache
def get_compiler_options(platform: str) -> dict[str, str] | None:
    """Returns what a training step is compiled with, or None for the usual.

    XLA_FLAGS that name the same options win; an XLA that does not know them, for they
    are experimental, compiles without.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if platform != "cpu" or any(name in flags for name in CPU_OPTIONS):
        return None
    try:
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return CPU_OPTIONS


def get_training_precision(config: Any) -> policy.Precision:
    """Returns the precision that a config trains with."""
    words = config.get("precision")  # absent in configs from before there was a choice
    return policy.get_precision(words.training if words else "fast")


def build_training_experiment(config: Any) -> Experiment:
    """Returns the experiment, with a model that computes as training shall."""
    experiment = build_experiment(config, TRAINING)
    precision = get_training_precision(config)
    if precision.dtype == "float32":  # then model.dtype decides
        return experiment
    model = policy.with_compute_dtype(precision, experiment.model)
    return dataclasses.replace(experiment, model=model)


def with_sampling_precision(
    config: Any, experiment: Experiment, platform: str | None = None
) -> tuple[Experiment, Callable]:
    """Returns the experiment with a model that computes as sample.py's will.

    Beside it stands a function to wrap around the network, which sets the precision.
    """
    words = config.get("precision")
    precision = policy.get_precision(words.model if words else "exact")
    model = policy.with_compute_dtype(precision, experiment.model)
    if platform:  # which may be absent here
        model = attention.resolve_attention(model, platform)
    around = partial(policy.with_precision, precision, platform=platform)
    return dataclasses.replace(experiment, model=model), around


def create_state(experiment: Experiment, params: Params) -> TrainState:
    """Returns the state of step 0 of a run."""
    return TrainState.create(
        params,
        experiment.optimizer,
        ema_decay=experiment.ema_decay,
        timestep_sampler_state=experiment.timestep_sampler_state,
    )


def eval_state_shapes(experiment: Experiment, mesh: Any) -> tuple[TrainState, Any]:
    """Returns a run's TrainState as shapes, and its shardings; nothing is allocated.

    With an adapter it is that over a base of floats, but for what adapter.int8 names.
    """
    adapter, params = experiment.adapter, base_shapes(experiment)
    if adapter:
        base = adapter.quantized_base_shapes(params)
        params = jax.eval_shape(adapter.add_adapters, base, jax.random.key(0))
    shapes = jax.eval_shape(partial(create_state, experiment), params)
    return shapes, sharding_rules.state_shardings(mesh, shapes)


def jit_train_step(
    config: Any, experiment: Any, mesh: Any, shardings: Any, platform: str | None = None
) -> Any:
    """Returns the jitted step(state, codec, batch, key) -> (state, metrics).

    Args:
      config, experiment: of build_training_experiment().
      mesh: the devices.
      shardings: of the state, which is donated.
      platform: where the step will run, if not on this process's backend.
    """
    step = make_train_step(
        attention.resolve_attention(experiment.model, platform),
        experiment.process,
        experiment.optimizer,
        ema_decay=experiment.ema_decay,
        label_dropout=config.label_drop,
        microbatches=config.accumulate,
        timestep_sampler=experiment.timesteps,
        log_quartiles=config.get("log_quartiles", False),
        shard_gradients=sharding_rules.shard_gradients(mesh),
    )
    step = policy.with_precision(get_training_precision(config), step, platform)
    return jax.jit(
        mesh_lib.with_mesh(mesh, step),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=get_compiler_options(platform or jax.default_backend()),
    )


def lower_train_step(
    config: Any, experiment: Any, mesh: Any, batch_size: int, platform: str
) -> Any:
    """Lowers the training step on batches of latents, from shapes alone."""
    shapes, shardings = eval_state_shapes(experiment, mesh)
    rows, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=rows)
    batch = {
        "latent": shape(jnp.float32, batch_size, *experiment.shape),
        "label": shape(jnp.int32, batch_size),
    }
    key = mesh_lib.with_shardings(jax.eval_shape(lambda: jax.random.key(0)), whole)
    step = jit_train_step(config, experiment, mesh, shardings, platform)
    state = mesh_lib.with_shardings(shapes, shardings)
    return step.lower(state, experiment.codec, batch, key)


def lower_sampling(
    experiment: Any, mesh: Any, batch_size: int, around: Callable
) -> Any:
    """Lowers what draws a batch of samples, from shapes alone."""
    init = partial(init_params, experiment.model, experiment.shape)
    params = jax.eval_shape(init, jax.random.key(0))
    whole = jax.tree.map(lambda _: mesh_lib.replicated(mesh), params)
    params = mesh_lib.with_shardings(params, whole)
    return lower_batch(experiment, params, mesh, batch_size, with_precision=around)
