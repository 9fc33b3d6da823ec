"""Noise that the images of a job start from: the seed's, a file's, or PyTorch's.

The released PyTorch scripts seed the one generator of the process, build the network,
whose initial values take numbers from it although the checkpoint overwrites them, and
draw then. torch_noise does the same on a CPU; a CUDA generator is another algorithm.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sit_jax.diffusion import rng
from sit_jax.diffusion.guidance import is_unguided
from sit_jax.errors import UserError
from sit_jax.files import as_path, atomic_write, is_remote
from sit_jax.parallel import multihost
from sit_jax.sampling import outputs

MAX_STEP_NOISE = 4 * 2**30  # bytes
SKIP = 2**24  # numbers thrown away at a time


def load_noise(context: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Reads or draws the noise that a job names.

    Args:
        context: a SamplingContext.

    Returns:
        The noise to start from [n, h, w, c] or None, and that of the sampler's steps
        [steps, n, h, w, c] or None.
    """
    job, experiment, count = context.job, context.experiment, len(context.job.labels)
    if job.noise is None:
        return None, None
    if not job.noise.startswith("torch:"):
        start = read_noise(job.noise, experiment.shape)
        if len(start) != count:
            raise UserError(f"--num {count}, but {job.noise} has {len(start)} images")
        if not is_remote(job.noise):
            multihost.assert_equal_files(as_path(job.noise))
        return start, None
    if not job.noise[6:].isdecimal():
        raise UserError(f"--noise {job.noise}: torch:SEED with a whole number")
    return torch_noise(
        int(job.noise[6:]),
        experiment.model,
        experiment.shape,
        count,
        num_steps=experiment.sampler.num_noise_draws(experiment.process),
        doubled=not is_unguided(experiment.guidance),
    )


def read_noise(
    path: Any, shape: tuple[int, ...], flag: str = "--noise"
) -> Float[np.ndarray, "n h w c"]:
    """Reads float32 [n, *shape] from a .npy.

    Args:
        path: of the file.
        shape: of one image.
        flag: names the file in error messages.

    Raises:
        UserError: the file has another shape, no floats, or values not finite.
    """
    try:
        start = outputs.load_npy(path)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if start.shape[1:] != shape or start.dtype.kind != "f":
        raise UserError(
            f"{flag} {path} is {start.dtype} {start.shape}; it must be float32 "
            f"(N, {', '.join(map(str, shape))})"
        )
    if not np.isfinite(start).all():
        raise UserError(f"{flag} {path} has values that are not finite")
    return start.astype(np.float32)


def initial_noise(context: Any) -> Float[np.ndarray, "n h w c"]:
    """Returns the noise float32 [N, H, W, C] that the images of a job start from."""
    start, _ = load_noise(context)
    if start is not None:
        return start
    count, shape = len(context.job.labels), context.experiment.shape
    blocks = (np.arange(i, min(i + 256, count)) for i in range(0, count, 256))
    keys = (rng.image_keys(context.job.seed, block) for block in blocks)
    return np.concatenate([np.asarray(rng.initial_noise(k, shape)) for k in keys])


def save_noise(path: Any, context: Any, overwrite: bool) -> None:
    """Writes the initial noise to a .npy, unless the file holds just that already."""
    path, array = Path(path), initial_noise(context)
    if path.suffix != ".npy":
        raise UserError(f"--save-noise {path}: write a name ending in .npy")
    with contextlib.suppress(UserError):  # a run that was killed may have left it
        stored = outputs.load_npy(path)
        overwrite |= stored.dtype == array.dtype and np.array_equal(stored, array)
    path = outputs.check_output(path, overwrite)
    multihost.barrier()  # until all have seen that the place is free
    if multihost.is_primary():
        with atomic_write(path) as name:
            np.save(name, array)


def words_before_noise(model: Any, shape: tuple[int, int, int]) -> int:
    """Returns how many 32-bit numbers the released code takes to build a DiT or SiT.

    Every linear layer is initialised by PyTorch (weight and bias) and its weight again
    by Xavier's rule; the patch convolution likewise; the time network's weights and
    the label table once more by a normal law. Drawing a normal law of n values takes
    n numbers, and 16 more if n is no multiple of 16 (below 16 it would differ).
    """
    d, hidden = model.width, int(model.width * model.mlp_ratio)
    pixels = model.patch**2 * shape[-1]
    out = pixels * (2 if model.learn_sigma else 1)
    linear = lambda n, m: 2 * n * m + m
    block = linear(d, 3 * d) + linear(d, d) + linear(d, 6 * d)
    block += linear(d, hidden) + linear(hidden, d)
    time = linear(256, d) + linear(d, d) + _normal(256 * d) + _normal(d * d)
    labels = 2 * _normal((model.classes + model.null_label) * d)
    head = linear(d, out) + linear(d, 2 * d)
    return model.depth * block + linear(pixels, d) + time + labels + head


def torch_noise(
    seed: int,
    model: Any,
    shape: tuple[int, int, int],
    count: int,
    num_steps: int = 0,
    doubled: bool = True,
) -> tuple[Float[np.ndarray, "n h w c"], Float[np.ndarray, "steps n h w c"] | None]:
    """Draws the noise of the released PyTorch scripts.

    Args:
        seed: of torch's generator.
        model: the network, whose construction takes numbers first.
        shape: of one image, (h, w, c).
        count: how many images.
        num_steps: for how many steps the sampler takes noise.
        doubled: whether the script runs guidance's null half beside the batch, so that
            each step draws for twice as many images.

    Returns:
        The noise to start from, and that of the steps or None.
    """
    size = num_steps * math.prod(shape) * 4 * count
    if size > MAX_STEP_NOISE:
        raise UserError(
            f"{num_steps} steps of noise for {count} images are {size / 1e9:.3g} GB; "
            "draw fewer images at once with torch's noise"
        )
    try:
        import torch
    except ImportError as error:
        raise UserError("--noise torch:SEED needs torch: pip install torch") from error
    generator = torch.Generator().manual_seed(seed)
    words = words_before_noise(model, shape)
    for first in range(0, words, SKIP):
        torch.rand(min(SKIP, words - first), generator=generator)
    height, width, channels = shape

    def draw_images(rows):
        noise = torch.randn(rows, channels, height, width, generator=generator)
        return np.moveaxis(noise[:count].numpy(), 1, -1).copy()

    start = draw_images(count)
    rows = 2 * count if doubled else count
    steps = [draw_images(rows) for _ in range(num_steps)]
    return start, np.stack(steps) if steps else None


def _normal(n):
    return n + 16 * (n % 16 > 0)
