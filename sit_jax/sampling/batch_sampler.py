"""Draws data for labels: the model, guided and sampled, in batches of one shape."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from sit_jax.adapters.apply import apply_model
from sit_jax.diffusion import rng
from sit_jax.diffusion.guidance import (
    classifier_free_guidance,
    guide_both_halves,
    is_unguided,
)
from sit_jax.experiment import Experiment
from sit_jax.models import attention
from sit_jax.parallel.mesh import (
    BATCH,
    batch_sharding,
    device_put_global,
    replicated,
    with_mesh,
    with_shardings,
)

# Rows of a batch that go through the network together on a CPU: two, so that one guided
# image costs no more than itself (1.8 times as fast as in four, and at a batch of 16
# 0.9 times). In a narrow network the last bits of a row depend on which of two it is:
# measured with a width of 16, and not with 128 or 384.
CHUNK, NARROW_CHUNK, NARROW = 2, 4, 128


def make_sample_fn(
    experiment: Experiment,
    mesh: Mesh,
    guiding_model: Any = None,
    with_precision: Callable[[Callable], Callable] = lambda fn: fn,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Returns the function that turns noise and labels of a batch into data.

    Args:
        experiment: model, process, sampler, guidance.
        mesh: the devices of the batch.
        guiding_model: a network for autoguidance; params is then a pair.
        with_precision: fn -> fn, puts the precision around each network.

    Returns:
        sample(params, keys [B], labels [B], start [B, H, W, C], recorded), which
        returns data [B, H, W, C] and stats. keys: rng.image_keys; start: the first
        noise; recorded: noise of its steps [steps, B, H, W, C], of which zero steps
        stand for that of the keys.
    """
    platform = mesh.devices.flat[0].platform
    process, sampler = experiment.process, experiment.sampler

    def bind(model, params):
        model = attention.resolve_attention(model, platform)
        apply = with_precision(partial(apply_model, model))
        if platform == "cpu":
            apply = map_fixed_batches(apply, mesh, chunk_rows(model))
        return partial(apply, params)

    def sample(params, keys, labels, start, recorded):
        params, guiding_params = params if guiding_model else (params, None)
        guide, noise, options = classifier_free_guidance, start, {}
        is_guided = not is_unguided(experiment.guidance)
        if guiding_model:
            options = {"guiding_model": bind(guiding_model, guiding_params)}
        elif is_guided and sampler.integrates_null_half:
            guide, noise = guide_both_halves, jnp.concatenate([start, start])
        net = guide(
            bind(experiment.model, params),
            labels,
            experiment.model.classes,
            experiment.guidance,
            experiment.guidance_channels,
            progress=process.progress,
            **options,
        )
        step_noise = (
            rng.recorded_noise(recorded)
            if len(recorded)
            else rng.step_noise(keys, start.shape[1:])
        )
        result = sampler(net, process, noise, step_noise)
        return result.data[: len(start)], result.stats()

    return sample


def chunk_rows(model: Any) -> int:
    """Returns how many rows a network takes at a time on a CPU."""
    return NARROW_CHUNK if model.width < NARROW else CHUNK


def map_fixed_batches(apply: Callable, mesh: Mesh, chunk: int) -> Callable:
    """Makes apply(params, x, t, labels) run on `chunk` rows at a time on every device.

    XLA's CPU backend chooses the code of a matrix product, and with it the last bits,
    by the number of rows. One shape for all batches makes an image independent of
    how many are drawn beside it, and on how many devices.
    """

    def on_one_device(params, *inputs):
        rows = len(inputs[0])
        missing = -rows % chunk
        fill = lambda a: jnp.concatenate([a, a[:1].repeat(missing, 0)])
        split = lambda a: fill(a).reshape(-1, chunk, *a.shape[1:])
        out = jax.lax.map(
            lambda inputs: apply(params, *inputs), jax.tree.map(split, inputs)
        )
        return out.reshape(-1, *out.shape[2:])[:rows]

    batch = batch_sharding(mesh).spec
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), batch, batch, batch),
        out_specs=batch,
        check_vma=False,  # diffrax's loops around it fail the check
    )


class BatchSampler:
    """Draws any number of images with one compiled program for a batch of them.

    An image does not depend on the batch size, except with an adaptive sampler whose
    error is one norm over the batch.

    Args:
        experiment: model, process, sampler, guidance.
        params: its model's parameters.
        mesh: the devices.
        batch_size: is rounded up to a multiple of the devices.
        guiding_model: (model, params), for autoguidance.
        num_noise_draws: for how many steps noise will be recorded.
        with_precision: see make_sample_fn.
    """

    def __init__(
        self,
        experiment: Experiment,
        params: Any,
        mesh: Mesh,
        batch_size: int,
        *,
        guiding_model: tuple | None = None,
        num_noise_draws: int = 0,
        with_precision: Callable[[Callable], Callable] = lambda fn: fn,
    ):
        self._shape, self._shardings = experiment.shape, _shardings(mesh)
        self._params = (params, guiding_model[1]) if guiding_model else params
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        started = time.perf_counter()
        lowered = lower_batch(
            experiment,
            self._params,
            mesh,
            self.batch_size,
            guiding_model=guiding_model and guiding_model[0],
            num_noise_draws=num_noise_draws,
            with_precision=with_precision,
        )
        self._run = lowered.compile()
        self.compile_seconds = time.perf_counter() - started

    def __call__(
        self,
        seed: int,
        labels: Int[np.ndarray, " n"],
        start: Float[np.ndarray, "n h w c"] | None = None,
        params: Any = None,
        *,
        recorded: Float[np.ndarray, "steps n h w c"] | None = None,
        todo: Iterable[int] | None = None,
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yields (data [n, h, w, c], stats) of each batch, on the host.

        Image i follows from seed, i and labels[i]. The last batch is filled up with
        repetitions of the last image, which are dropped.

        Args:
            seed: of the noise.
            labels: one for each image.
            start: noise to start from, instead of the seed's.
            params: instead of those of the constructor.
            recorded: noise of the sampler's steps, instead of the seed's.
            todo: numbers of the batches to draw; all by default.
        """
        params = self._params if params is None else params
        if recorded is None:
            recorded = np.zeros((0, len(labels), *self._shape), np.float32)
        batches = range(-(-len(labels) // self.batch_size))
        for batch in batches if todo is None else todo:
            first = batch * self.batch_size
            index = np.arange(first, first + self.batch_size)
            real = min(self.batch_size, len(labels) - first)
            index = np.minimum(index, len(labels) - 1)
            keys = rng.image_keys(seed, jnp.asarray(index))
            noise = (
                rng.initial_noise(keys, self._shape) if start is None else start[index]
            )
            inputs = (keys, np.int32(labels[index]), noise, recorded[:, index])
            inputs = device_put_global(inputs, self._shardings)
            data, stats = self._run(params, *inputs)
            yield np.asarray(data)[:real], _to_host(stats, real)


def lower_batch(
    experiment: Experiment,
    params: Any,
    mesh: Mesh,
    size: int,
    *,
    guiding_model: Any = None,
    num_noise_draws: int = 0,
    with_precision: Callable[[Callable], Callable] = lambda fn: fn,
) -> jax.stages.Lowered:
    """Lowers the program of a batch; params may be shapes. See BatchSampler."""
    keys = jax.eval_shape(partial(rng.image_keys, 0), jnp.arange(size))
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    start = jax.ShapeDtypeStruct((size, *experiment.shape), jnp.float32)
    recorded = jax.ShapeDtypeStruct((num_noise_draws, *start.shape), jnp.float32)
    inputs = map(with_shardings, (keys, labels, start, recorded), _shardings(mesh))
    # of a mesh over several hosts, each gets all of the images
    out = replicated(mesh) if mesh.is_multi_process else None
    sample = make_sample_fn(experiment, mesh, guiding_model, with_precision)
    sample = jax.jit(with_mesh(mesh, sample), out_shardings=out)
    return sample.lower(params, *inputs)


def _shardings(mesh):
    """Returns the shardings of keys, labels, the first noise and that of the steps."""
    rows = batch_sharding(mesh)
    return rows, rows, rows, NamedSharding(mesh, PartitionSpec(None, BATCH))


def _to_host(stats, real):
    """Returns stats on the host; those of one value an image for `real` images."""
    stats = {name: np.asarray(value) for name, value in stats.items()}
    trajectory = stats.pop("trajectory", None)
    stats = {name: v[:real] if v.ndim else v for name, v in stats.items()}
    return stats if trajectory is None else stats | {"trajectory": trajectory[:, :real]}
