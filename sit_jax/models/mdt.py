"""MDT and MDTv2: diffusion transformers that also learn to fill in masked tokens.

Gao et al., arXiv:2303.14389, as in its code (branch mdtv1, and main for v2). Without a
mask, which is how one samples, a DiT with learned positions: two tables of absolute
ones, a bias for every relative one. In training a second pass hides tokens from the
encoder; before the last `decoder` blocks a side block guesses what is hidden.

A mask is an order of the tokens, a permutation drawn for every image, of which the
first ones are visible. Shapes stay static: as many tokens as can ever be visible are
gathered; those that a smaller draw hides are among them, and nobody attends to them.
With mask_buckets there are several programs, for more or fewer gathered tokens.

Shapes: b images, t tokens, m gathered tokens, d features, h heads.
"""

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from sit_jax.errors import UserError
from sit_jax.models import dit
from sit_jax.models.layers import (
    DTYPES,
    Attention,
    Dense,
    Mlp,
    residual_block,
    scan_blocks,
    sincos_pos_embed_2d,
)
from sit_jax.parallel.mesh import HEADS, unshard_weight


class VisibleTokens(struct.PyTreeNode):
    """Which of a batch's tokens an encoder works on."""

    order: Int[Array, "b m"]  # numbers of the tokens that are gathered
    rank: Int[Array, "b t"]  # of every token in the whole order
    is_valid: Bool[Array, "b m"] | None  # None: all that are gathered are visible
    is_hidden: Bool[Array, "b t"]


class PositionAttention(Attention):
    """Self-attention with a learned bias for every relative position.

    The released table has three rows that nothing points to.
    """

    side: int = 16  # tokens along a side of the image

    @nn.compact
    def __call__(  # type: ignore[override]  # the bias is its own
        self, x: Float[Array, "b m d"], visible: VisibleTokens | None = None
    ) -> Float[Array, "b m d"]:
        rows = (2 * self.side - 1) ** 2 + 3
        normal = nn.initializers.normal(0.02)  # released: cut off at 100 of these
        table = self.param("position", normal, (rows, self.heads))
        table = unshard_weight(table, None, HEADS)  # else its pieces split the bias
        bias = table[relative_positions(self.side)].transpose(2, 0, 1)  # (h, t, t)
        if visible is None:
            return super().__call__(x, bias[None])
        mask = visible.is_valid  # (b, m)
        return super().__call__(
            x,
            bias=gather_bias(bias, visible),  # (b, h, m, m)
            mask=None if mask is None else mask[:, None, None],
        )


class MDTBlock(nn.Module):
    """A DiT block with biased attention; a long skip is merged before all else."""

    heads: int
    side: int
    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32
    attention: str = "auto"
    returns_skip: bool = False  # its output is a later block's skip

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b m d"],
        skip: Float[Array, "b m d"] | None,
        c: Float[Array, "b d"],
        visible: VisibleTokens | None,
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b m d"] | None]:
        """Returns the tokens, and what the scan over blocks stacks."""
        if skip is not None:
            both = jnp.concatenate([x, skip], axis=-1)  # (b, m, 2 d)
            x = Dense(x.shape[-1], dtype=self.dtype, name="skip")(both)
        attention = PositionAttention(
            self.heads, self.dtype, self.attention, self.side, name="attn"
        )
        mlp = Mlp(self.mlp_ratio, self.dtype, name="mlp")
        x = residual_block(x, c, partial(attention, visible=visible), mlp)
        return x, x if self.returns_skip else None


class MDT(dit.Transformer):
    """The first version.

    Attributes:
      decoder: how many of the `depth` blocks come after the masked tokens are guessed.
      mask_ratio: share of tokens hidden in the masked pass; None for no such pass.
      mask_ratio_range: how much more is hidden, drawn evenly at every step.
      mask_buckets: how many programs of the masked pass there are, for more or fewer
        visible tokens. A step runs the smallest that suffices.
    """

    decoder: int = 2
    mask_ratio: float | None = 0.3
    mask_ratio_range: float = 0.0
    mask_buckets: int = 1
    has_attention_bias: ClassVar[bool] = True

    @nn.nowrap
    def pass_inputs(
        self, key: Array, shape: tuple[int, ...]
    ) -> dict[str, dict[str, Array]]:
        """Returns the extra inputs of the network in each pass of a training step.

        Args:
          key: for the masks.
          shape: of the batch, (b, h, w, c).

        Returns:
          A dict keyed by what the names of the pass's metrics begin with, as released:
          "" for the plain pass, "m_" for the masked one.
        """
        if self.mask_ratio is None:
            return {"": {}}
        check_shapes(self, shape)
        tokens = (shape[1] // self.patch) ** 2
        return {"": {}, "m_": sample_masks(self, key, shape[0], tokens)}

    @nn.nowrap
    def bucket_inputs(
        self, inputs: dict[str, Any], shape: tuple[int, ...]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Returns which mask bucket a pass needs, and its inputs for each bucket."""
        if inputs.get("num_visible") is None:
            return 0, [inputs]
        sizes = bucket_sizes(self, (shape[1] // self.patch) ** 2)
        index = jnp.searchsorted(jnp.asarray(sizes), inputs["num_visible"].max())
        return index, [{**inputs, "bucket_size": size} for size in sizes]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s s c"],
        t: Float[Array, " b"],
        y: Int[Array, " b"],
        order: Int[Array, "b t"] | None = None,
        num_visible: Int[Array, " b"] | None = None,
        bucket_size: int | None = None,
    ) -> Float[Array, "b s s out"]:
        """Predicts from noisy data x at times t, given labels y.

        Args:
          x, t, y: as of DiT.
          order: if given, all tokens but its first are hidden from the encoder.
          num_visible: how many are visible; None for as many as `mask_ratio` leaves.
          bucket_size: how many tokens the encoder works on; by default as many as
            `mask_ratio` leaves.

        Returns:
          The prediction in float32, with 2 c channels if learn_sigma, else c.

        Raises:
          UserError: fields that no network can have, or that do not fit x.
        """
        check_shapes(self, x.shape)
        channels, side = x.shape[-1], x.shape[1] // self.patch
        visible = None
        if order is not None:
            if self.mask_ratio is None:
                raise UserError("model.mask_ratio is None: this network masks nothing")
            size = bucket_size or max_visible(side * side, self.mask_ratio)
            visible = visible_tokens(order, num_visible, size)
        tokens = x = self.embed_patches(x, self._pos_embed("positions", side))
        c = self.embed_condition(t, y)
        x = x if visible is None else gather_tokens(x, visible)  # (b, m, d)
        x = self.encode(x, c, visible, side)
        x = self._fill_in(x, c, visible, side)  # (b, t, d)
        x = self.decode(x, tokens, c, side)
        return self.predict_pixels(x, c, channels)

    def encode(self, x, c, visible, side):
        """Runs the blocks that see only visible tokens."""
        first = self.depth - self.decoder
        return self._run_slice(slice(first), x, c, visible, side)

    def decode(self, x, tokens, c, side):
        """Runs the last blocks on all tokens; `tokens` are those of the input."""
        del tokens  # MDTv2's skip
        first = self.depth - self.decoder
        return self._run_slice(slice(first, self.depth), x, c, None, side)

    def _run_slice(self, part, x, c, visible, side):
        """Runs some blocks of one stack for all.

        Released weights do not tell where the decoder begins, so one array holds both.
        """
        if self.is_initializing():
            if part.start is None:
                self._stack(self.depth, side, name="blocks")(x, None, c, None)
            return x
        weights = jax.tree.map(lambda w: w[part], self.variables["params"]["blocks"])
        length = part.stop - (part.start or 0)
        is_watched = self.is_mutable_collection("intermediates")
        blocks = self._stack(
            length, side, name="blocks", parent=None, returns_skip=is_watched
        )
        x, stacked = blocks.apply({"params": weights}, x, None, c, visible)
        if is_watched:  # flax sees nothing that runs outside of the module tree
            name = "encoder_blocks" if part.start is None else "decoder_blocks"
            self.sow("intermediates", name, stacked)
        return x

    def _stack(self, length, side, skip_axis=nn.broadcast, **fields):
        """Returns stacked blocks; skip_axis: 0 if each block has its own skip."""
        in_axes = (skip_axis, nn.broadcast, nn.broadcast)
        blocks = scan_blocks(MDTBlock, length, self.remat, self.unroll, in_axes)
        return blocks(
            heads=self.heads,
            side=side,
            mlp_ratio=self.mlp_ratio,
            dtype=DTYPES[self.dtype],
            attention=self.attention,
            **fields,
        )

    def _fill_in(self, x, c, visible, side):
        """Adds positions to all tokens, and guesses those that were hidden."""
        normal = nn.initializers.normal(0.02)
        mask_token = self.param("hidden_token", normal, (1, 1, self.width))
        positions = self._pos_embed("decoder_positions", side)
        if visible is None and not self.is_initializing():
            return (x + positions).astype(x.dtype)
        side_block = self._stack(1, side, name="side_blocks")
        if visible is None:
            side_block(x, None, c, None)
            return x
        x = (scatter_tokens(x, visible, mask_token) + positions).astype(x.dtype)
        guess, _ = side_block(x, None, c, None)
        return jnp.where(visible.is_hidden[..., None], guess, x)

    def _pos_embed(self, name, side):
        init = lambda key: jnp.asarray(sincos_pos_embed_2d(side, self.width))[None]
        return self.param(name, init)


class MDTv2(MDT):
    """Long skips inside the encoder, and one from the input to every decoder block."""

    decoder: int = 4
    mask_ratio_range: float = 0.2

    def encode(self, x, c, visible, side):
        """Runs two halves; the first's outputs are the second's skips, in reverse."""
        half = (self.depth - self.decoder) // 2
        first = self._stack(half, side, name="in_blocks", returns_skip=True)
        second = self._stack(half, side, skip_axis=0, name="out_blocks")
        x, skips = first(x, None, c, visible)
        return second(x, skips[::-1], c, visible)[0]

    def decode(self, x, tokens, c, side):
        """Runs the last blocks on all tokens, each with the input as its skip."""
        blocks = self._stack(self.decoder, side, name="decoder_blocks")
        return blocks(x, tokens, c, None)[0]


def sample_masks(
    model: MDT, key: Array, batch_size: int, tokens: int
) -> dict[str, Int[Array, "b ..."]]:
    """Draws which tokens of each image are visible.

    The masked share is mask_ratio + mask_ratio_range * U(0, 1), one draw for the batch
    (released: one for each GPU's part of it). Rounding to visible tokens is as
    released, in float32.

    Returns:
      {"order": int [b, t]}, with "num_visible" int [b] where the share is drawn too.
    """
    key_order, key_ratio = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(key_order, (batch_size, tokens)), axis=1)
    if not model.mask_ratio_range:
        return {"order": order}
    least = model.mask_ratio or 0.0
    ratio = least + model.mask_ratio_range * jax.random.uniform(key_ratio)
    num_visible = jnp.floor(tokens * (1 - ratio)).astype(int)
    # which is not rounded in float32
    num_visible = jnp.minimum(num_visible, max_visible(tokens, least))
    return {"order": order, "num_visible": jnp.full(batch_size, num_visible)}


def max_visible(tokens: int, mask_ratio: float) -> int:
    """Returns how many tokens the smallest masked share leaves."""
    return int(tokens * (1 - mask_ratio))


def bucket_sizes(model: MDT, tokens: int) -> list[int]:
    """Returns the visible tokens of each bucket, evenly spaced up to the most."""
    mask_ratio = model.mask_ratio or 0.0
    most = max_visible(tokens, mask_ratio)
    least = max_visible(tokens, mask_ratio + model.mask_ratio_range)
    count = model.mask_buckets
    return sorted({most - (most - least) * i // count for i in range(count)})


def visible_tokens(
    order: Int[Array, "b t"], num_visible: Int[Array, " b"] | None, size: int
) -> VisibleTokens:
    """Returns a mask of which `size` tokens are gathered; None: all are visible."""
    rank = jnp.argsort(order, axis=1)
    is_valid = None
    if num_visible is None:
        num_visible = jnp.full(len(order), size)
    else:
        is_valid = jnp.arange(size)[None] < num_visible[:, None]
    return VisibleTokens(order[:, :size], rank, is_valid, rank >= num_visible[:, None])


def gather_tokens(
    x: Float[Array, "b t d"], visible: VisibleTokens
) -> Float[Array, "b m d"]:
    """Returns the tokens that are gathered, in their order."""
    return jnp.take_along_axis(x, visible.order[..., None], axis=1)


def scatter_tokens(
    x: Float[Array, "b m d"], visible: VisibleTokens, mask_token: Float[Array, "1 1 d"]
) -> Float[Array, "b t d"]:
    """Returns all tokens in place, mask_token where one is hidden."""
    index = jnp.minimum(visible.rank, x.shape[1] - 1)  # of any token where hidden
    tokens = jnp.take_along_axis(x, index[..., None], axis=1)
    is_hidden = visible.is_hidden[..., None]
    return jnp.where(is_hidden, mask_token.astype(x.dtype), tokens)


def gather_bias(
    bias: Float[Array, "h t t"], visible: VisibleTokens
) -> Float[Array, "b h m m"]:
    """Returns the bias between the tokens that are gathered."""
    gather = lambda order: bias[:, order[:, None], order[None]]
    return jax.vmap(gather)(visible.order)


def relative_positions(side: int) -> Int[np.ndarray, "t t"]:
    """Returns the number of the relative position of every query and key.

    As in BEiT (arXiv:2106.08254), whose table it points into has three rows more.
    """
    rows, columns = np.divmod(np.arange(side * side), side)
    down = rows[:, None] - rows[None] + side - 1
    across = columns[:, None] - columns[None] + side - 1
    return down * (2 * side - 1) + across


def check_shapes(model: MDT, shape: tuple[int, ...]) -> None:
    """Checks an MDT's fields against each other and data of shape [b, h, w, c].

    Raises:
      UserError: they do not fit; the error names the remedy.
    """
    dit.check_shapes(model, shape)
    depth, decoder, name = model.depth, model.decoder, type(model).__name__
    has_skips = isinstance(model, MDTv2)
    most = depth - (2 if has_skips else 1)
    if not 1 <= decoder <= most:
        raise UserError(
            f"decoder {decoder} of {depth} blocks leaves no encoder, or no decoder; "
            f"{name} needs model.decoder in 1..{most}"
        )
    if has_skips and (depth - decoder) % 2:
        raise UserError(
            f"depth {depth} - decoder {decoder} is odd: {name}'s skips pair the blocks "
            "of the encoder; change one of the two by 1"
        )
    if model.mask_ratio is None:
        return
    if model.mask_buckets < 1:
        raise UserError(f"model.mask_buckets is {model.mask_buckets}: at least 1")
    tokens = (shape[1] // model.patch) ** 2
    low, spread = model.mask_ratio, model.mask_ratio_range
    if not (low >= 0 and spread >= 0 and max_visible(tokens, low + spread) >= 1):
        raise UserError(
            f"model.mask_ratio {low} and model.mask_ratio_range {spread} must be from "
            f"0 on, and together leave one of {tokens} tokens visible"
        )
