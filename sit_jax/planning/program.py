"""The programs of a config, as the scripts run them and as a plan compiles them."""

import dataclasses
import os
from functools import cache, partial

import jax
import jax.numpy as jnp

from sit_jax.convert.base import base_shapes
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models import attention
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import batch_sharding, replicated, with_mesh, with_shardings
from sit_jax.precision import policy
from sit_jax.sampling.generation import lowered
from sit_jax.training.state import create_train_state, init_params
from sit_jax.training.step import make_train_step

# XLA gives its library YNN sums, convolutions and single products. Without the last,
# which Eigen then takes, a training step is 2 to 4 % quicker (docs/performance.md).
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE,"
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
}


@cache
def compiler_options(platform):
    """What a training step is compiled with on a platform, if XLA knows it there."""
    given = os.environ.get("XLA_FLAGS", "")
    if platform != "cpu" or any(name in given for name in CPU_OPTIONS):
        return None
    try:
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return None  # the option is experimental
    return CPU_OPTIONS


def training_recipe(config):
    """The recipe, with a model that computes in bfloat16 if training shall."""
    parts, word = build_experiment(config, TRAINING), training_precision(config)
    if word.dtype == "float32":  # then model.dtype decides
        return parts
    model = policy.with_compute_dtype(word, parts.model)
    return dataclasses.replace(parts, model=model)


def training_precision(config):
    words = config.get("precision")  # absent in configs from before there was a choice
    return policy.get_precision(words.training if words else "fast")


def state_shapes(parts, mesh):
    """-> the TrainState of a run as shapes, and its shardings; nothing is allocated.

    Of a run of adapters, over a base that is floats but for what adapter.int8 says.
    """

    def begin(key, base):
        params = parts.adapter.add_adapters(base, key) if parts.adapter else base
        return create_train_state(
            parts.optimizer, params, parts.ema_decay, parts.losses
        )

    base = base_shapes(parts)
    if parts.adapter:
        base = parts.adapter.quantized_base_shapes(base)
    shapes = jax.eval_shape(begin, jax.random.key(0), base)
    return shapes, sharding_rules.state_shardings(mesh, shapes)


def sampling_recipe(config, platform):
    """-> the recipe with a model of the config's sampling precision, and fn -> fn."""
    parts, around = as_sampled(config, build_experiment(config, TRAINING), platform)
    model = attention.resolve_attention(parts.model, platform)
    return dataclasses.replace(parts, model=model), around


def as_sampled(config, parts, platform=None):
    """-> the recipe with a model that computes as sample.py's will, and fn -> fn."""
    words = config.get("precision")
    word = policy.get_precision(words.model if words else "exact")
    model = policy.with_compute_dtype(word, parts.model)
    around = partial(policy.with_precision, word, platform=platform)
    return dataclasses.replace(parts, model=model), around


def lowered_sampling(parts, mesh, batch_size, around):
    """What draws a batch from a recipe, lowered from shapes alone."""
    init = partial(init_params, parts.model, parts.shape)
    params = jax.eval_shape(init, jax.random.key(0))
    where = jax.tree.map(lambda _: replicated(mesh), params)
    params = with_shardings(params, where)
    return lowered(parts, params, mesh, batch_size, around=around)


def lowered_step(config, parts, mesh, batch_size, platform):
    """train_step on batches of latents, lowered from shapes alone."""
    shapes, where = state_shapes(parts, mesh)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=rows)
    batch = {
        "latent": shape(jnp.float32, batch_size, *parts.shape),
        "label": shape(jnp.int32, batch_size),
    }
    key = with_shardings(jax.eval_shape(lambda: jax.random.key(0)), whole)
    step = train_step(config, parts, mesh, where, platform)
    return step.lower(with_shardings(shapes, where), parts.codec, batch, key)


def train_step(config, parts, mesh, where, platform=None):
    """-> jitted step(state, codec, batch, key) -> (state, metrics) on a mesh.

    where: shardings of the state, which is donated. platform: where the step will run,
    if not on this process's backend.
    """
    step = make_train_step(
        attention.resolve_attention(parts.model, platform),
        parts.process,
        parts.optimizer,
        parts.ema_decay,
        config.label_drop,
        config.accumulate,
        parts.timesteps,
        config.get("log_quartiles", False),
        place=sharding_rules.shard_gradients(mesh),
    )
    step = policy.with_precision(training_precision(config), step, platform)
    step = with_mesh(mesh, step)
    options = compiler_options(platform or jax.default_backend())
    how = {"donate_argnums": 0, "compiler_options": options}
    return jax.jit(step, out_shardings=(where, None), **how)
