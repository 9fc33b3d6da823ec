"""Labels to images: the model, guided and sampled, in batches of one shape."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sit_jax.adapters.apply import apply_model
from sit_jax.diffusion import rng
from sit_jax.diffusion.guidance import (
    classifier_free_guidance,
    guide_both_halves,
    is_unguided,
)
from sit_jax.models import attention
from sit_jax.parallel.mesh import (
    BATCH,
    batch_sharding,
    device_put_global,
    replicated,
    with_mesh,
    with_shardings,
)

# Rows of a batch that go through the network together on a CPU: one guided image. Four
# rows take 0.87 to 0.98 of the CPU time for SiT-S/2, but fill up a single image.
CHUNK = 2


def make_sample_fn(parts, mesh, weak=None, around=lambda fn: fn):
    """-> generate(params, keys [B], labels [B], start [B, H, W, C]) -> (data, stats).

    parts: an Experiment; keys: noise.image_keys; start: the sampler's first noise.
    weak: a second model, to be led away from; params is then a pair. given: noise of
    the sampler's steps [steps, B, H, W, C], instead of the keys'. around: fn -> fn,
    put around each network: its precision.
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


def map_fixed_batches(apply, mesh):
    """apply(params, x [B, ...], t [B], y [B]), CHUNK rows at a time on every device.

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
    """Draws any number of images with one compiled program for batch_size of them.

    batch_size is rounded up to a multiple of the devices. An image does not depend on
    it, but with an adaptive sampler whose error is one norm over the batch.
    weak: a second network, (model, params), for autoguidance; around: see
    make_sample_fn; kicks: how many steps' noise will be given.
    """

    def __init__(
        self,
        parts,
        params,
        mesh,
        batch_size,
        weak=None,
        kicks=0,
        around=lambda fn: fn,
    ):
        self._shape, self._kicks = parts.shape, kicks
        self._params = (params, weak[1]) if weak else params
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._where = _places(mesh)
        begun = time.perf_counter()
        model = weak[0] if weak else None
        run = lower_batch(
            parts, self._params, mesh, self.batch_size, model, kicks, around
        )
        self._run = run.compile()
        self.compile_seconds = time.perf_counter() - begun

    def __call__(self, seed, labels, start=None, params=None, given=None, todo=None):
        """Yields (data [n, H, W, C], stats) on the host until all labels are served.

        Image i follows from seed, i and labels[i]; start: given noise [N, H, W, C]
        instead of the seed's, given [kicks, N, H, W, C] instead of that of the steps.
        todo: only these batches, by number. The last batch is filled up with
        repetitions of the last image, which are dropped; stats are numbers of the
        batch, or [n].
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
            arguments = device_put_global(arguments, self._where[:3])
            if self._kicks:
                kicks = device_put_global(given[:, index], self._where[3])
                arguments = (*arguments, kicks)
            data, stats = self._run(params, *arguments)
            yield np.asarray(data)[:real], _cut(stats, real)


def lower_batch(parts, params, mesh, size, weak=None, kicks=0, around=lambda fn: fn):
    """Lowers the program of a batch; params may be shapes. See BatchSampler."""
    keys = jax.eval_shape(partial(rng.image_keys, 0), jnp.arange(size))
    start = jax.ShapeDtypeStruct((size, *parts.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    given = jax.ShapeDtypeStruct((kicks, *start.shape), jnp.float32)
    arguments = (keys, labels, start, given)[: 4 if kicks else 3]
    arguments = map(with_shardings, arguments, _places(mesh))
    # of a mesh over several hosts, each gets all of the images
    out = replicated(mesh) if mesh.is_multi_process else None
    generate = with_mesh(mesh, make_sample_fn(parts, mesh, weak, around))
    return jax.jit(generate, out_shardings=out).lower(params, *arguments)


def _places(mesh):
    """Shardings of keys, labels, start, and the noise of later steps."""
    rows = batch_sharding(mesh)
    return rows, rows, rows, NamedSharding(mesh, PartitionSpec(None, BATCH))


def _cut(stats, real):
    """Stats on the host, of the first `real` images where they are one an image."""
    rows = {"trajectory": (slice(None), slice(real))}
    stats = {name: np.asarray(value) for name, value in stats.items()}
    return {
        name: value[rows.get(name, slice(real))] if value.ndim else value
        for name, value in stats.items()
    }
