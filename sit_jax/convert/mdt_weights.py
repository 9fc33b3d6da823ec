"""How MDT's released PyTorch weights are named and laid out; see convert/port.py."""

import math

from sit_jax.errors import UserError
from sit_jax.models import dit, masking
from sit_jax.models.mdt import MDTv2

TABLE = "attn.rel_pos_bias.relative_position_bias_table"
INDEX = "attn.rel_pos_bias.relative_position_index"
_TELLING = (
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
)


def block_rules(torch, flax):
    rules = dit.block_rules(torch, flax)
    table = (f"{torch}.*.{TABLE}", f"{flax}/attn/position", "nh->nh")
    return [*rules[:4], table, *rules[4:]]


def skip_rules(torch, flax):
    joining = dit.dense(f"{torch}.*.skip_linear", f"{flax}/skip")
    return [*block_rules(torch, flax), *joining]


FRONT = [
    ("pos_embed", "positions", "atd->atd"),
    ("decoder_pos_embed", "decoder_positions", "atd->atd"),
    ("mask_token", "hidden_token", "atd->atd"),
    *dit.FRONT,
]
BACK = [*block_rules("sideblocks", "side_blocks"), *dit.BACK]
RULES = [*FRONT, *block_rules("blocks", "blocks"), *BACK]
RULES_V2 = [
    *FRONT,
    *block_rules("en_inblocks", "in_blocks"),
    *skip_rules("en_outblocks", "out_blocks"),
    *skip_rules("de_blocks", "decoder_blocks"),
    *BACK,
]


def constants(model, side):
    """The buffers of a torch file, equal in all blocks, for data [side, side, C]."""
    index = masking.offsets(side // model.patch)
    half = (model.depth - model.decoder) // 2
    if isinstance(model, MDTv2):
        runs = {"en_inblocks": half, "en_outblocks": half, "de_blocks": model.decoder}
    else:
        runs = {"blocks": model.depth}
    runs["sideblocks"] = 1
    names = [f"{run}.{i}" for run, length in runs.items() for i in range(length)]
    return {f"{name}.{INDEX}": index for name in names}


def describe(state):
    """-> the fields and sizes of the network that a torch state dict belongs to.

    As dit.describe, but the bias tables tell the heads. Of MDT, though not of MDTv2,
    nothing tells the decoder.
    """
    shape = lambda name: tuple(state[name].shape)
    length = lambda run: len(
        {n.split(".")[1] for n in state if n.startswith(f"{run}.")}
    )
    second = family(state) == "mdtv2"
    block = "en_inblocks.0" if second else "blocks.0"
    needed = (*_TELLING, f"{block}.mlp.fc1.weight", f"{block}.{TABLE}")
    if missing := [name for name in needed if name not in state]:
        raise UserError(f"not the weights of an MDT: no {', '.join(missing)}")
    width, channels, patch, _ = shape("x_embedder.proj.weight")
    out = shape("final_layer.linear.weight")[0] // patch**2
    told = dict(
        depth=length("blocks"),
        width=width,
        heads=shape(f"{block}.{TABLE}")[1],
        patch=patch,
        mlp_ratio=shape(f"{block}.mlp.fc1.weight")[0] / width,
        classes=shape("y_embedder.embedding_table.weight")[0] - 1,
        learn_sigma=out == 2 * channels,
        channels=channels,
        side=math.isqrt(shape("pos_embed")[1]) * patch,
    )
    if second:
        depth = sum(map(length, ("en_inblocks", "en_outblocks", "de_blocks")))
        told |= dict(depth=depth, decoder=length("de_blocks"))
    return told


def family(state):
    """mdt, mdtv2 or None, by the names in a torch state dict."""
    if any(name.startswith("en_inblocks.") for name in state):
        return "mdtv2"
    return "mdt" if f"blocks.0.{TABLE}" in state else None
