"""Attention: softmax(q k' / sqrt(D) + bias) v, by the program that fits the device.

All of them sum in float32 and give the same numbers but for rounding; which is the
quickest is measured, see docs/performance.md.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from sit_jax.errors import UserError
from sit_jax.models import by_head
from sit_jax.models.by_head import KEPT, LEAST
from sit_jax.models.turns import in_turns
from sit_jax.parallel.sharding import BATCH, HEADS, by_heads, by_rows

CACHE = 2**22  # bytes of scores from which a CPU takes one head at a time
# bytes of scores of the heads that a TPU takes at once; a v4 has more fast memory
TURN, TURNS = 2**24, {"TPU v4": 2**26}
CUDNN_TYPES = ("bfloat16", "float16")
CUDNN_HEAD = 128  # most values of a head that cuDNN takes on every GPU from Ampere on


def attend(q, k, v, bias=None, mask=None, by="auto"):
    """q [B, T, heads, D/heads], k, v [B, S, ...] -> like q, by a program of PROGRAMS.

    bias float [B or 1, heads or 1, T, S] is added to the scores, mask bool [B or 1,
    heads or 1, T or 1, S] tells which of them count.
    """
    return PROGRAMS[chosen(by, q.dtype, q.shape[-1], bias is not None)](
        q, k, v, bias, mask
    )


def attend_packed(qkv, bias=None, mask=None, by="auto"):
    """As attend, of qkv [B, T, 3, heads, D/heads] -> [B, T, heads, D/heads]."""
    rows, length, _, heads, width = qkv.shape
    by = chosen(by, qkv.dtype, width, bias is not None)
    if by == "head_by_head" and _worth_turns((rows, length, heads, width), length):
        return by_head.attend((by_rows(qkv),), bias, mask)
    # by split, whose gradient is one array put together and not the sum of three
    parts = (part.squeeze(2) for part in jnp.split(qkv, 3, axis=2))
    q, k, v = (by_rows(part, None, HEADS) for part in parts)
    return PROGRAMS[by](q, k, v, bias, mask)


def xla(q, k, v, bias=None, mask=None):
    return jax.nn.dot_product_attention(q, k, v, bias, mask, implementation="xla")


def cudnn(q, k, v, bias=None, mask=None):
    """Fused: scores never reach the memory. No forward-mode derivative."""
    return jax.nn.dot_product_attention(q, k, v, bias, mask, implementation="cudnn")


def head_by_head(q, k, v, bias=None, mask=None):
    """One head after another, so that its scores stay in a CPU's cache; see by_head.py.

    Heads and not images take turns, since a batch may be split over devices; heads that
    are split over devices themselves are left in one piece. No forward-mode derivative.
    A query that the mask lets see nothing gets no meaningful gradient.
    """
    if not _worth_turns(q.shape, k.shape[1]):
        return xla(q, k, v, bias, mask)
    return by_head.attend(tuple(x[:, :, None] for x in (q, k, v)), bias, mask)


def _worth_turns(shape, keys):
    """shape (B, T, heads, D) of q -> whether a CPU's heads take turns."""
    rows, length, heads, _ = shape
    small = rows * heads * length * keys * 4 <= CACHE
    return not (small or heads == 1 or _heads_are_split())


def heads_first(q, k, v, bias=None, mask=None):
    """One head after another, each in the layout that suits a TPU; see turns.

    No forward-mode derivative where heads take turns.
    """
    q, k, v = (by_heads(rearrange(x, "b t h d -> h b d t")) for x in (q, k, v))
    return rearrange(turns(q, k, v, bias, mask), "h b d t -> b t h d")


def turns(q, k, v, bias=None, mask=None):
    """q [heads, B, D/heads, T], k, v [heads, B, D/heads, S] -> like q.

    With the tokens last, heads of 72 values fill a TPU's tiles of 8 x 128 and are
    copied into no other layout; the scores of one head stay in the chip's fast memory.
    Backward they are computed again, from what was kept under the name KEPT.
    """
    parts = {"q": q, "k": k, "v": v}
    if bias is not None:
        bias = jnp.moveaxis(bias, 1, 0)
        parts["bias"] = jnp.broadcast_to(bias, (len(q), *bias.shape[1:]))
    shared, own = {}, {}
    if mask is not None and mask.shape[1] > 1:
        own["mask"] = jnp.moveaxis(mask, 1, 0)
    elif mask is not None:
        shared["mask"] = mask[:, 0]
    many = _at_once(q, k)
    if many == len(q) or _heads_are_split():
        out = jax.vmap(lambda *part: _of_head(*part, shared))(parts, own)
    else:
        out = in_turns(_of_head, many, parts, own, shared)
    return checkpoint_name(out, KEPT)


@jax.checkpoint
def _of_head(part, own, shared):
    """q [B, D, T], k, v [B, D, S], bias [B or 1, T, S] of a head -> like q."""
    q, k, v = (part[name] for name in "qkv")
    # as jax.nn does: else the scores' gradient, float32, would be multiplied as such
    half = q.dtype == jnp.bfloat16
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if half else None
    how = {"precision": precision, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bdt,bds->bts", q, k, **how)
    scores = scores / math.sqrt(q.shape[1])
    if "bias" in part:
        scores = scores + part["bias"]
    for mask in (own | shared).values():
        scores = jnp.where(mask, scores, LEAST)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bts,bds->bdt", weights, v)


def _at_once(q, k):
    """How many heads take a turn together: a divisor of them, at least one.

    Where the scores of all are small, turns cost more than they save; else those of a
    turn and their gradients stay in a TPU's fast memory.
    """
    heads, images, _, length = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape.get(axis, 1) for axis in BATCH)
    each = 4 * length * k.shape[-1] * -(-images // parts)
    device = getattr(mesh.abstract_device, "device_kind", None)
    turn = TURNS.get(device, TURN)
    if heads * each <= 2 * turn:
        return heads
    fit = (n for n in range(1, heads + 1) if heads % n == 0 and n * each <= turn)
    return max(fit, default=1)


def _heads_are_split():
    return jax.sharding.get_abstract_mesh().shape.get(HEADS, 1) > 1


PROGRAMS = {
    "xla": xla,
    "cudnn": cudnn,
    "head_by_head": head_by_head,
    "heads_first": heads_first,
}
NAMES = ("auto", *PROGRAMS)


def chosen(by, dtype, head, biased, platform=None):
    """-> the name in PROGRAMS that `by` stands for, where it will run.

    dtype of the products, head: values of one; biased: scores get a bias, whose
    gradient cuDNN does not have for every shape. platform: by default this process's.
    """
    platform = platform or jax.default_backend()
    if by not in NAMES:
        raise UserError(f"attention is {by!r}: choose one of {', '.join(NAMES)}")
    gpu = platform in ("gpu", "cuda")
    fits = (
        gpu
        and str(jnp.dtype(dtype)) in CUDNN_TYPES
        and head % 8 == 0
        and head <= CUDNN_HEAD
    )
    if by == "cudnn" and not (fits and not biased):
        kind = "a bias" if biased else "none"
        raise UserError(
            "attention is 'cudnn', which needs a GPU, bfloat16, heads of a multiple of "
            f"8 and at most {CUDNN_HEAD} values and no bias; here are {platform}, "
            f"{jnp.dtype(dtype).name}, {head} and {kind}: choose auto"
        )
    if by != "auto":
        return by
    if platform == "cpu":
        return "head_by_head"
    if platform == "tpu":  # with a bias, turns take more cycles on a v4 (docs/tpu.md)
        return "xla" if biased else "heads_first"
    return "cudnn" if fits and not biased else "xla"


def of(model, platform=None):
    """-> the name in PROGRAMS of a DiT, SiT or MDT."""
    head, dtype = model.width // model.heads, jnp.dtype(model.dtype)
    return chosen(model.attention, dtype, head, model.biased, platform)


def settled(model, platform=None):
    """The model with its program named, for a platform that may not be this one."""
    if not hasattr(model, "attention"):
        return model
    return dataclasses.replace(model, attention=of(model, platform))
