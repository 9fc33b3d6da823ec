"""How a cache of latents was made, so that it is not taken for another one."""

import dataclasses

from sit_jax.errors import UserError
from sit_jax.files import parse_json

PLAN, DONE = "plan.json", "cache.json"  # the tags alone; the tags and what came out
WORDS = {  # what a tag is called where it contradicts
    "encoder_sha256": "the VAE's encoder (sha256)",
    "listing_sha256": "the list of images (sha256)",
    "size": "the resolution",
    "views": "the number of views (2: both flips)",
}


@dataclasses.dataclass(frozen=True)
class Tags:
    """How a cache was made. None: not known, as of latents from elsewhere."""

    kind: str  # moments, or latent (drawn and scaled already)
    shape: tuple[int, int, int]  # of a record
    dtype: str
    views: int  # records an image: 2 with a mirrored one
    encoder_sha256: str | None
    precision: str | None  # of the VAE: a word of precision.py
    scale: float | None  # that latents of variance about 1 need
    size: int | None  # of the images, in pixels
    crop: str | None
    listing_sha256: str | None
    records: int  # that the source had
    classes: int
    shards: int

    def shard(self, number):
        """-> its file's name, the range of the source's records it is made of."""
        name = f"moments-{number:05d}-of-{self.shards:05d}.array_record"
        ends = (self.records * k // self.shards for k in (number, number + 1))
        return name, range(*ends)


def default_shards(records):
    """As many as processes may want to share, and never more than 256 files."""
    return max(1, min(256, -(-records // 256)))


def read_json(path):
    """-> the content of one of a cache's two JSON files."""
    try:
        return parse_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); extract again") from error


def read_tags(values, path):
    """-> Tags from the JSON of a cache at path."""
    try:
        tags = Tags(**values)
    except TypeError as error:
        raise UserError(
            f"{path} is of another version ({error}); extract it again"
        ) from (error)
    sizes = (tags.records, tags.classes, tags.shards, tags.views)
    if not (
        isinstance(tags.shape, list | tuple)
        and len(tags.shape) == 3
        and all(isinstance(n, int) and n > 0 for n in (*tags.shape, *sizes))
        and tags.dtype in ("float32", "float16")
        and tags.kind in ("moments", "latent")
    ):
        raise UserError(f"{path} is damaged: {values}; extract it again")
    return dataclasses.replace(tags, shape=tuple(tags.shape))


def require_same(path, tags, wanted, remedy="extract into another folder"):
    """Refuses tags unlike the wanted {name: value}, and says which one.

    One that has words of its own goes first: the resolution rather than the shape.
    """
    for name in sorted(wanted, key=lambda name: name not in WORDS):
        value = wanted[name]
        found = getattr(tags, name)
        if found is not None and found != value:
            raise UserError(
                f"{path} was made with another value of {WORDS.get(name, name)}: "
                f"{found}, not {value}; {remedy}"
            )
