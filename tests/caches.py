"""A cache of latents of a few images, as it is written and as it is changed."""

import dataclasses

import numpy as np

from sit_jax.data.filling import finish, missing, open_plan, shard
from sit_jax.data.tags import Tags

TAGS = Tags(
    kind="moments",
    shape=(3, 2, 4),
    dtype="float32",
    views=2,
    encoder_sha256="e" * 64,
    precision="exact",
    scale=0.5,
    size=16,
    crop="ADM centre crop",
    listing_sha256="l" * 64,
    records=11,
    classes=5,
    shards=3,
)


def moments(i, mirrored=0, tags=TAGS):
    """Moments of record i, and of its mirror image: nothing like them."""
    rng = np.random.default_rng((i, mirrored))
    return rng.normal(size=tags.shape).astype(tags.dtype)


def write(path, tags=TAGS, broken=()):
    """A cache of moments(i) with label i % 5, without the broken ones."""
    open_plan(path, tags)
    for number in missing(path, tags, 0, 1):
        with shard(path, tags, number) as filled:
            ids = tags.shard(number)[1]
            left = {i: f"{i}.jpg: torn" for i in ids if i in broken}
            ids = [i for i in ids if i not in broken]
            each = [[moments(i, m, tags) for i in ids] for m in range(tags.views)]
            views = [np.reshape(view, (-1, *tags.shape)) for view in each]
            filled.add(ids, [i % 5 for i in ids], views, left)
    return finish(path, tags, [f"class {c}" for c in range(tags.classes)])


def changed(**fields):
    return dataclasses.replace(TAGS, **fields)
