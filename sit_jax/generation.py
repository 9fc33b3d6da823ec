"""Labels to images: the model, guided and sampled, in batches of one shape."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sit_jax import noise
from sit_jax.guidance import guided
from sit_jax.sharding import split_batch

CHUNK = 4  # rows of a batch that go through the network together on a CPU


def make_generate(parts, mesh):
    """-> generate(params, keys [B], labels [B], start [B, H, W, C]) -> (data, stats).

    parts: a Recipe; keys: noise.image_keys; start: the noise the sampler begins from.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def generate(params, keys, labels, start):
        apply = lambda params, *inputs: parts.model.apply({"params": params}, *inputs)
        net = partial(in_chunks(apply, mesh) if on_cpu else apply, params)
        net = guided(
            net, labels, parts.model.classes, parts.guidance, parts.guidance_channels
        )
        draw = noise.steps(keys, start.shape[1:])
        return parts.sampler(draw, parts.process, net, start)

    return generate


def in_chunks(apply, mesh):
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

    batch = split_batch(mesh).spec
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), batch, batch, batch),
        out_specs=batch,
        check_vma=False,  # diffrax's loops around it fail the check
    )


class Generator:
    """Draws any number of images with one compiled program for batch_size of them.

    batch_size is rounded up to a multiple of the devices. An image does not depend on
    it, but with an adaptive sampler, whose error is one norm over the batch.
    """

    def __init__(self, parts, params, mesh, batch_size):
        self._shape, self._params = parts.shape, params
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        begun = time.perf_counter()
        self._run = self._compiled(make_generate(parts, mesh), split_batch(mesh))
        self.compile_seconds = time.perf_counter() - begun

    def __call__(self, seed, labels, start=None, params=None):
        """Yields (data [n, H, W, C], stats) on the host until all labels are served.

        Image i follows from seed, i and labels[i]; start: given noise [N, H, W, C]
        instead of the seed's. The last batch is filled up with repetitions of the
        last image, which are dropped.
        """
        params = self._params if params is None else params
        for first in range(0, len(labels), self.batch_size):
            index = np.arange(first, first + self.batch_size)
            real = min(self.batch_size, len(labels) - first)
            index = np.minimum(index, len(labels) - 1)
            keys = noise.image_keys(seed, jnp.asarray(index))
            begin = noise.start(keys, self._shape) if start is None else start[index]
            arguments = (keys, jnp.asarray(labels[index], jnp.int32), begin)
            data, stats = self._run(params, *jax.device_put(arguments, self._where))
            yield np.asarray(data)[:real], jax.tree.map(np.asarray, stats)

    def _compiled(self, generate, where):
        self._where = where
        keys = jax.eval_shape(partial(noise.image_keys, 0), jnp.arange(self.batch_size))
        start = jax.ShapeDtypeStruct((self.batch_size, *self._shape), jnp.float32)
        labels = jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        arguments = jax.tree.map(shaped, (keys, labels, start))
        return jax.jit(generate).lower(self._params, *arguments).compile()
