"""What a job's images start from: the seed's noise, a file's, or torch's."""

from pathlib import Path

import numpy as np

from sit_jax.diffusion import rng
from sit_jax.diffusion.guidance import is_unguided
from sit_jax.errors import UserError
from sit_jax.files import as_path, is_remote
from sit_jax.parallel import multihost
from sit_jax.sampling import array_files, outputs
from sit_jax.sampling.torch_noise import torch_noise


def check(word):
    """Refuses what begins like torch's noise and has no seed."""
    if word and word.startswith("torch:") and not word[6:].isdecimal():
        raise UserError(f"--noise {word}: torch:SEED with a whole number")


def noise_of(room):
    """-> given start or None, given noise of the steps or None, how many steps'."""
    job, shape = room.job, room.parts.shape
    if job.noise is None:
        return None, None, 0
    if not job.noise.startswith("torch:"):
        start = given_noise(job.noise, shape)
        if not is_remote(job.noise):
            multihost.assert_equal_files(as_path(job.noise))
        return start, None, 0
    check(job.noise)
    sampler = room.parts.sampler
    kicks = sampler.num_noise_draws(room.parts.process)
    start, given = torch_noise(
        int(job.noise[6:]),
        *(room.parts.model, shape, len(job.labels), kicks),
        doubled=not is_unguided(room.parts.guidance),
    )
    return start, given, kicks


def given_noise(path, shape, flag="--noise"):
    """-> float32 [N, *shape] of a .npy; flag: what it was given by, for complaints."""
    try:
        start = array_files.load(path)
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


def starts(room):
    """-> float32 [N, H, W, C]: what the images of a Studio's job start from."""
    given = noise_of(room)[0]
    if given is not None:
        return given
    numbers = np.arange(len(room.job.labels))
    blocks = np.array_split(numbers, -(-len(numbers) // 256))
    draw = lambda block: rng.initial_noise(
        rng.image_keys(room.job.seed, block), room.parts.shape
    )
    return np.concatenate([np.asarray(draw(block)) for block in blocks])


def save(path, room, overwrite):
    """Writes starts() to a .npy; what is there already is no mistake if it is them."""
    path, array = Path(path), None
    if path.suffix != ".npy":
        raise UserError(f"--save-noise {path}: write a name ending in .npy")
    if path.is_file() and not overwrite:
        array = starts(room)
        overwrite = outputs.is_array(path, array)  # of a run that was killed
    path = outputs.check(path, overwrite)
    array = starts(room) if array is None else array
    multihost.barrier()  # until all have seen that the place is free
    if multihost.is_primary():
        outputs.save_array(path, array)
