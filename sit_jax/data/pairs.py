"""fast-DiT's folder of .npy pairs, to and from a cache.

A pair is one latent, drawn, scaled and flipped or not once and for all, and its label;
so a cache made of pairs holds latents and not moments.
"""

from pathlib import Path

import numpy as np

from sit_jax.data.coins import coins
from sit_jax.data.filling import finish, missing, open_plan, shard
from sit_jax.data.names import Names
from sit_jax.data.tags import Tags, default_shards
from sit_jax.errors import UserError
from sit_jax.files import atomic_write, require_free, require_space

CHUNK = 64


def from_pairs(source, out, scale=0.18215, show=lambda images, of: None):
    """LatentFolder -> a cache in the folder `out`. -> (images, cache.json's content).

    The encoder is not known: nobody wrote it down.
    """
    tags = Tags(
        kind="latent",
        shape=tuple(source.shape),
        dtype="float32",
        views=1,
        encoder_sha256=None,
        precision=None,
        scale=scale,
        size=None,
        crop=None,
        listing_sha256=Names(source.names).digest(),
        records=len(source),
        classes=source.classes,
        shards=default_shards(len(source)),
    )
    path = open_plan(out, tags)
    for number in missing(path, tags, 0, 1):
        ids = tags.shard(number)[1]
        with shard(path, tags, number) as filled:
            for at in range(0, len(ids), CHUNK):
                part = ids[at : at + CHUNK]
                records = [source[i] for i in part]
                latents = np.stack([record["latent"] for record in records])
                filled.add(part, [record["label"] for record in records], [latents])
                show(len(part), len(source))
    names = [str(label) for label in range(source.classes)]
    return len(source), finish(path, tags, names)


def to_pairs(cache, out, seed=0, overwrite=False, show=lambda images, of: None):
    """LatentCache -> fast-DiT's folder at `out`. -> images.

    Draw and flip of image i follow from (seed, i).
    """
    tags = cache.tags
    if tags.kind == "moments" and tags.scale is None:
        raise UserError(f"{cache.path} does not say its scale; extract it again")
    out = require_free(out, overwrite)
    depth = tags.shape[-1] // (2 if tags.kind == "moments" else 1)
    require_space(out, len(cache) * (4 * np.prod(tags.shape[:2]) * depth + 128))
    with atomic_write(out) as name:
        features = Path(name) / "imagenet256_features"
        labels = Path(name) / "imagenet256_labels"
        features.mkdir(parents=True)
        labels.mkdir()
        for i, mirror in enumerate(coins(seed, np.arange(len(cache)))):
            record = cache.mirrored(i) if mirror and cache.flip else cache[i]
            latent = _drawn(record, (seed, i), tags.scale)
            np.save(features / f"{i}.npy", np.moveaxis(latent, -1, 0)[None])
            np.save(labels / f"{i}.npy", np.array([record["label"]], np.int64))
            show(1, len(cache))
    return len(cache)


def _drawn(record, seed, scale):
    """[h, w, C] float32, scaled, of a record of moments or of a latent."""
    if "latent" in record:
        return record["latent"]
    mean, log_var = np.split(record["moments"], 2, axis=-1)
    noise = np.random.default_rng(seed).standard_normal(mean.shape, np.float32)
    std = np.exp(np.clip(log_var, -30, 20) / 2)
    return np.float32(scale) * (mean + std * noise)
