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

# Rows of a batch that go through the network together on a CPU. With two, one guided
# image would cost less, but a single chunk has other bytes than one of many.
CHUNK = 4


def make_sample_fn(
    parts: Experiment,
    mesh: Mesh,
    weak: Any = None,
    around: Callable[[Callable], Callable] = lambda fn: fn,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Returns the function that turns noise and labels of a batch into data.

    Args:
        parts: the experiment: model, process, sampler, guidance.
        mesh: the devices of the batch.
        weak: a guiding model for autoguidance; params is then a pair.
        around: fn -> fn, put around each network: its precision.

    Returns:
        generate(params, keys [B], labels [B], start [B, H, W, C], given=None), which
        returns data [B, H, W, C] and stats. keys: rng.image_keys; start: the sampler's
        first noise; given: noise of its steps [steps, B, H, W, C] instead of the keys'.
    """
    platform = mesh.devices.flat[0].platform

    def network(model, params):
        model = attention.resolve_attention(model, platform)
        run = around(partial(apply_model, model))
        return partial(
            map_fixed_batches(run, mesh) if platform == "cpu" else run, params
        )

    def generate(params, keys, labels, start, given=None):
        strong, worse = params if weak else (params, None)
        net = network(parts.model, strong)
        worse = network(weak, worse) if weak else None
        draw = rng.step_noise(keys, start.shape[1:])
        draw = draw if given is None else rng.recorded_noise(given)
        settings = (parts.model.classes, parts.guidance, parts.guidance_channels)
        progress = parts.process.progress
        if (
            weak
            or is_unguided(parts.guidance)
            or not parts.sampler.integrates_null_half
        ):
            net = classifier_free_guidance(
                net, labels, *settings, guiding_model=worse, progress=progress
            )
            result = parts.sampler(net, parts.process, start, draw)
            return result.data, result.stats()
        net = guide_both_halves(net, labels, *settings, progress=progress)
        both = jnp.concatenate([start, start])
        result = parts.sampler(net, parts.process, both, draw)
        return result.data[: len(start)], result.stats()

    return generate


def map_fixed_batches(apply: Callable, mesh: Mesh) -> Callable:
    """Makes apply(params, x, t, labels) run on CHUNK rows at a time on every device.

    XLA's CPU backend chooses the code of a matrix product, and with it the last bits,
    by the number of rows. One shape for all batches makes an image independent of
    how many are drawn beside it, and on how many devices.
    """

    def on_one_device(params, *inputs):
        rows = len(inputs[0])
        missing = -rows % CHUNK
        fill = lambda a: jnp.concatenate([a, a[:1].repeat(missing, 0)])
        split = lambda a: fill(a).reshape(-1, CHUNK, *a.shape[1:])
        out = jax.lax.map(
            lambda chunk: apply(params, *chunk), jax.tree.map(split, inputs)
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
        parts: the experiment.
        params: its model's parameters.
        mesh: the devices.
        batch_size: is rounded up to a multiple of the devices.
        weak: (model, params) of a guiding model, for autoguidance.
        kicks: for how many steps noise will be given.
        around: see make_sample_fn.
    """

    def __init__(
        self,
        parts: Experiment,
        params: Any,
        mesh: Mesh,
        batch_size: int,
        *,
        weak: tuple | None = None,
        kicks: int = 0,
        around: Callable[[Callable], Callable] = lambda fn: fn,
    ):
        self._shape, self._kicks = parts.shape, kicks
        self._params = (params, weak[1]) if weak else params
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._shardings = _shardings(mesh)
        started = time.perf_counter()
        model = weak[0] if weak else None
        lowered = lower_batch(
            parts,
            self._params,
            mesh,
            self.batch_size,
            weak=model,
            kicks=kicks,
            around=around,
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
        given: Float[np.ndarray, "steps n h w c"] | None = None,
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
            given: noise of the sampler's steps, instead of the seed's.
            todo: numbers of the batches to draw; all by default.
        """
        params = self._params if params is None else params
        batches = range(-(-len(labels) // self.batch_size))
        for batch in batches if todo is None else todo:
            first = batch * self.batch_size
            index = np.arange(first, first + self.batch_size)
            real = min(self.batch_size, len(labels) - first)
            index = np.minimum(index, len(labels) - 1)
            keys = rng.image_keys(seed, jnp.asarray(index))
            begin = (
                rng.initial_noise(keys, self._shape) if start is None else start[index]
            )
            arguments = (keys, jnp.asarray(labels[index], jnp.int32), begin)
            arguments = device_put_global(arguments, self._shardings[:3])
            if self._kicks:
                kicks = device_put_global(given[:, index], self._shardings[3])
                arguments = (*arguments, kicks)
            data, stats = self._run(params, *arguments)
            yield np.asarray(data)[:real], _to_host(stats, real)


def lower_batch(
    parts: Experiment,
    params: Any,
    mesh: Mesh,
    size: int,
    *,
    weak: Any = None,
    kicks: int = 0,
    around: Callable[[Callable], Callable] = lambda fn: fn,
) -> jax.stages.Lowered:
    """Lowers the program of a batch; params may be shapes. See BatchSampler."""
    keys = jax.eval_shape(partial(rng.image_keys, 0), jnp.arange(size))
    start = jax.ShapeDtypeStruct((size, *parts.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    given = jax.ShapeDtypeStruct((kicks, *start.shape), jnp.float32)
    arguments = (keys, labels, start, given)[: 4 if kicks else 3]
    arguments = map(with_shardings, arguments, _shardings(mesh))
    # of a mesh over several hosts, each gets all of the images
    out = replicated(mesh) if mesh.is_multi_process else None
    generate = with_mesh(mesh, make_sample_fn(parts, mesh, weak, around))
    return jax.jit(generate, out_shardings=out).lower(params, *arguments)


def _shardings(mesh):
    """Returns the shardings of keys, labels, start and the noise of later steps."""
    rows = batch_sharding(mesh)
    return rows, rows, rows, NamedSharding(mesh, PartitionSpec(None, BATCH))


def _to_host(stats, real):
    """Returns stats on the host; those of one value an image for `real` images."""
    rows = {"trajectory": (slice(None), slice(real))}
    stats = {name: np.asarray(value) for name, value in stats.items()}
    return {
        name: value[rows.get(name, slice(real))] if value.ndim else value
        for name, value in stats.items()
    }
