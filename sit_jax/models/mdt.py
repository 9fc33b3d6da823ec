"""MDT and MDTv2: diffusion transformers that also learn to fill in hidden tokens.

Gao et al., arXiv:2303.14389, as in its code (branch mdtv1, and main for v2). Without a
mask, which is how one samples, a DiT with learned positions: two tables of absolute
ones, a bias for every relative one. In training a second pass hides tokens from the
encoder; before the last `decoder` blocks a side block guesses what is hidden.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sit_jax.errors import UserError
from sit_jax.models import dit, masking
from sit_jax.models.layers import (
    DTYPES,
    Conditioning,
    Dense,
    Head,
    Mlp,
    Patches,
    attended,
    choose,
    grid_embedding,
    modulate,
    modulation,
    norm,
    stack,
)
from sit_jax.parallel.sharding import HEADS, by_rows, gathered


class Attention(nn.Module):
    """tokens [B, M, D], those of `seen` or all -> [B, M, D], with a bias by position.

    The released table has three rows that nothing points to.
    """

    heads: int
    side: int
    dtype: jnp.dtype = jnp.float32
    program: str = "auto"  # of attention.NAMES

    @nn.compact
    def __call__(self, x, seen=None):
        width, rows = x.shape[-1], (2 * self.side - 1) ** 2 + 3
        small = nn.initializers.normal(0.02)  # released: cut off at 100 of these
        table = self.param("position", small, (rows, self.heads))
        table = gathered(table, None, HEADS)  # else its pieces split the bias
        bias, mask = table[masking.offsets(self.side)].transpose(2, 0, 1), None
        if seen is None:
            bias = bias[None]
        else:
            bias = masking.among(bias, seen)
            mask = None if seen.valid is None else seen.valid[:, None, None]
        x = attended(x, self.heads, self.dtype, self.program, bias, mask)
        return Dense(width, dtype=self.dtype, split=(HEADS, None), name="proj")(x)


class Block(nn.Module):
    heads: int
    side: int
    mlp_ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"
    joins: bool = False  # merges a skip into x first
    leaves: bool = False  # its output is a later block's skip

    @nn.compact
    def __call__(self, x, skip, c, seen):
        """tokens and skip [B, M, D], c [B, D] -> tokens, and what the scan stacks."""
        if self.joins:
            both = jnp.concatenate([x, skip], axis=-1)
            x = Dense(x.shape[-1], dtype=self.dtype, name="skip")(both)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(6, c, self.dtype)
        y = modulate(norm("norm1")(x), shift1, scale1)
        how = (self.heads, self.side, self.dtype, self.attention)
        attention = Attention(*how, name="attn")
        x = by_rows(x + gate1 * attention(y, seen))
        y = modulate(norm("norm2")(x), shift2, scale2)
        x = by_rows(x + gate2 * Mlp(self.mlp_ratio, self.dtype, name="mlp")(y))
        return x, x if self.leaves else None


class MDT(nn.Module):
    """The first version; fields default to XL/2 on ImageNet.

    hide: the share of tokens hidden in the masked pass, None for no such pass; spread:
    how much more, drawn at every step; sizes: how many programs of the masked pass
    there are then, for more or fewer tokens. The smallest that suffices is run.
    """

    depth: int = 28
    width: int = 1152
    heads: int = 16
    patch: int = 2
    decoder: int = 2  # of the depth
    hide: float | None = 0.3
    spread: float = 0.0
    sizes: int = 1
    mlp_ratio: float = 4.0
    classes: int = 1000
    null_label: bool = True
    learn_sigma: bool = True
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"  # the program that computes it, of attention.NAMES
    biased = True  # its scores get a bias by position

    @nn.nowrap
    def passes(self, key, shape):
        """shape (B, H, W, C) -> what else the network is told in each pass of a step.

        Keyed by what the names of the pass's metrics begin with, as released.
        """
        if self.hide is None:
            return {"": {}}
        check(self, shape)
        tokens = (shape[1] // self.patch) ** 2
        masks = masking.draw(key, shape[0], tokens, self.hide, self.spread)
        return {"": {}, "m_": masks}

    @nn.nowrap
    def ways(self, inputs, shape):
        """inputs of a pass -> (index int [], the same inputs for each size)."""
        if inputs.get("kept") is None:
            return 0, [inputs]
        tokens, kept = (shape[1] // self.patch) ** 2, inputs["kept"].max()
        sizes = masking.sizes(tokens, self.hide, self.spread, self.sizes)
        each = [{**inputs, "size": size} for size in sizes]
        return jnp.searchsorted(jnp.asarray(sizes), kept), each

    @nn.compact
    def __call__(self, x, t, y, order=None, kept=None, size=None):
        """x [B, H, W, C], t [B], y [B] -> float32 [B, H, W, 2C], or C without sigma.

        order int [B, T] hides all tokens but its first, kept int [B] of them or, if
        kept is None, as many as `hide` leaves. size: how many are worked on, if not
        the most that can be.
        """
        check(self, x.shape)
        dtype = choose(DTYPES, self.dtype, "dtype")
        side, p = x.shape[1] // self.patch, self.patch
        out = x.shape[-1] * (2 if self.learn_sigma else 1)
        seen = None
        if order is not None:
            if self.hide is None:
                raise UserError("model.hide is None: this network hides no tokens")
            size = size or masking.most(side * side, self.hide)
            seen = masking.seen(order, kept, size)
        x = Patches(self.width, (p, p), (p, p), dtype=dtype, name="patch")(x)
        x = rearrange(x, "b h w d -> b (h w) d")
        x = whole = by_rows((x + self._positions("positions", side)).astype(dtype))
        c = Conditioning(self.width, self.classes + self.null_label, name="cond")(t, y)
        x = self.encode(x if seen is None else masking.take(x, seen), c, seen, side)
        x = self._fill_in(x, c, seen, side)
        x = self.decode(x, whole, c, side)
        x = Head(p * p * out, name="head")(x, c)
        return rearrange(
            x, "b (h w) (p q c) -> b (h p) (w q) c", h=side, p=p, q=p, c=out
        )

    def encode(self, x, c, seen, side):
        first = self.depth - self.decoder
        return self._some_blocks(slice(first), x, c, seen, side)

    def decode(self, x, whole, c, side):
        first = self.depth - self.decoder
        return self._some_blocks(slice(first, self.depth), x, c, None, side)

    def _some_blocks(self, part, x, c, seen, side):
        """One array for all: released weights do not tell where the decoder begins."""
        if self.is_initializing():
            if part.start is None:
                self._stack(self.depth, side, "blocks")(x, None, c, None)
            return x
        weights = jax.tree.map(lambda w: w[part], self.variables["params"]["blocks"])
        length = part.stop - (part.start or 0)
        watched = self.is_mutable_collection("intermediates")
        stacked = self._stack(length, side, "blocks", parent=None, leaves=watched)
        x, each = stacked.apply({"params": weights}, x, None, c, seen)
        if watched:  # flax sees nothing that runs outside of the module tree
            name = "encoder_blocks" if part.start is None else "decoder_blocks"
            self.sow("intermediates", name, each)
        return x

    def _stack(self, length, side, name, skips=nn.broadcast, **kinds):
        """-> a stack; skips: 0 if each block has its own; kinds: fields of a Block."""
        in_axes = (skips, nn.broadcast, nn.broadcast)
        stacked = stack(Block, length, self.remat, self.unroll, in_axes)
        how = (self.mlp_ratio, DTYPES[self.dtype], self.attention)
        return stacked(self.heads, side, *how, name=name, **kinds)

    def _fill_in(self, x, c, seen, side):
        """Adds positions to all tokens, and guesses those that were hidden."""
        small = nn.initializers.normal(0.02)
        token = self.param("hidden_token", small, (1, 1, self.width))
        positions = self._positions("decoder_positions", side)
        if seen is None and not self.is_initializing():
            return (x + positions).astype(x.dtype)
        side_block = self._stack(1, side, "side_blocks")
        if seen is None:
            side_block(x, None, c, None)
            return x
        whole = (masking.put_back(x, seen, token) + positions).astype(x.dtype)
        guess, _ = side_block(whole, None, c, None)
        return jnp.where(seen.hidden[..., None], guess, whole)

    def _positions(self, name, side):
        table = lambda key: jnp.asarray(grid_embedding(side, self.width))[None]
        return self.param(name, table)


class MDTv2(MDT):
    """Long skips inside the encoder, and one from the input to every decoder block."""

    decoder: int = 4
    spread: float = 0.2

    def encode(self, x, c, seen, side):
        half = (self.depth - self.decoder) // 2
        first = self._stack(half, side, "in_blocks", leaves=True)
        last = self._stack(half, side, "out_blocks", skips=0, joins=True)
        x, trail = first(x, None, c, seen)
        return last(x, trail[::-1], c, seen)[0]

    def decode(self, x, whole, c, side):
        stacked = self._stack(self.decoder, side, "decoder_blocks", joins=True)
        return stacked(x, whole, c, None)[0]


def check(model, shape):
    """Refuses what no MDT can be, or cannot do with data of this shape [B, H, W, C]."""
    dit.check(model, shape)
    depth, decoder, name = model.depth, model.decoder, type(model).__name__
    paired = isinstance(model, MDTv2)
    most = depth - (2 if paired else 1)
    if not 1 <= decoder <= most:
        raise UserError(
            f"decoder {decoder} of {depth} blocks leaves no encoder, or no decoder; "
            f"{name} needs model.decoder in 1..{most}"
        )
    if paired and (depth - decoder) % 2:
        raise UserError(
            f"depth {depth} - decoder {decoder} is odd: {name}'s skips pair the blocks "
            "of the encoder; change one of the two by 1"
        )
    if model.hide is None:
        return
    if not isinstance(model.sizes, int) or model.sizes < 1:
        raise UserError(f"model.sizes {model.sizes} must be a whole number from 1 on")
    tokens = (shape[1] // model.patch) ** 2
    low, high = model.hide, model.hide + model.spread
    if not (low >= 0 and model.spread >= 0 and int(tokens * (1 - high)) >= 1):
        raise UserError(
            f"model.hide {low} and model.spread {model.spread} must be from 0 on, and "
            f"together leave one of {tokens} tokens to be seen"
        )
