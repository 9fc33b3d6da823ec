"""How the weights of Stable Diffusion's autoencoder are named; see convert/port.py.

Three dialects tell the same: diffusers of today, diffusers before 0.16 (in which
ft-mse and ft-ema were released), and CompVis' latent-diffusion.
"""

import re

from sit_jax.errors import UserError
from sit_jax.models.dit import dense
from sit_jax.models.vae import first_tiled

# Of the attention, in diffusers before 0.16 -> today's.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# CompVis -> diffusers, tried in this order. Its decoder counts resolutions the other
# way round: {i} is what remains to be counted down from the highest.
COMPVIS = [
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.{\1}.resnets."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.{\1}.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
]


def rules(model):
    """-> the rules of an AutoencoderKL's fields, in the order of torch's state_dict."""
    return [
        *_encoder(model),
        *_decoder(model),
        *_conv("quant_conv", "encoder/quant"),
        *_conv("post_quant_conv", "decoder/begin/post_quant"),
    ]


def translated(names, levels):
    """names, of any dialect -> {today's name: given name}; levels: of resolution."""
    found = {}
    for given in names:
        name = given
        for pattern, new in COMPVIS:
            name = re.sub(pattern, new, name)
        count_down = lambda level: str(levels - 1 - int(level[1]))
        name = re.sub(r"\{(\d+)\}", count_down, name)
        name = re.sub(
            rf"\.attentions\.0\.({'|'.join(OLD)})\.",
            lambda old: f".attentions.0.{OLD[old[1]]}.",
            name,
        )
        if name in found:
            raise UserError(f"the weights name {name} twice, also as {given}")
        found[name] = given
    return found


def as_linear(name, array):
    """What some files keep as a 1 x 1 convolution [o, i, 1, 1] -> [o, i]."""
    is_attention = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name)
    if is_attention and array.shape[2:] == (1, 1):
        return array[..., 0, 0]
    return array


def _encoder(model):
    torch, flax = "encoder", "encoder"
    yield from _conv(f"{torch}.conv_in", f"{flax}/conv_in")
    before = model.channels[0]
    for i, width in enumerate(model.channels):
        level = f"{torch}.down_blocks.{i}"
        for j in range(model.layers):
            changes, before = width != before, width
            yield from _residual(
                f"{level}.resnets.{j}", f"{flax}/down_{i}_{j}", changes
            )
        if i < len(model.channels) - 1:
            yield from _conv(f"{level}.downsamplers.0.conv", f"{flax}/halve_{i}")
    yield from _middle(torch, flax)
    yield from _out(torch, flax)


def _decoder(model):
    torch, last = "decoder", len(model.channels) - 1
    part = lambda level: (
        f"decoder/{'begin' if level < first_tiled(model) else 'finish'}"
    )
    yield from _conv(f"{torch}.conv_in", "decoder/begin/conv_in")
    before = model.channels[-1]
    for i, width in enumerate(reversed(model.channels)):
        level = f"{torch}.up_blocks.{i}"
        for j in range(model.layers + 1):
            changes, before = width != before, width
            flax = f"{part(i)}/up_{i}_{j}"
            yield from _residual(f"{level}.resnets.{j}", flax, changes)
        if i < last:
            flax = f"{part(i + 1)}/double_{i + 1}"
            yield from _conv(f"{level}.upsamplers.0.conv", flax)
    yield from _middle(torch, "decoder/begin")
    yield from _out(torch, "decoder/finish")


def _middle(torch, flax):
    torch, flax = f"{torch}.mid_block", f"{flax}/middle"
    yield from _norm(f"{torch}.attentions.0.group_norm", f"{flax}/attention/norm")
    for name in "qkv":
        yield from dense(f"{torch}.attentions.0.to_{name}", f"{flax}/attention/{name}")
    yield from dense(f"{torch}.attentions.0.to_out.0", f"{flax}/attention/out")
    yield from _residual(f"{torch}.resnets.0", f"{flax}/before")
    yield from _residual(f"{torch}.resnets.1", f"{flax}/after")


def _residual(torch, flax, changes_width=False):
    for i in (1, 2):
        yield from _norm(f"{torch}.norm{i}", f"{flax}/norm{i}")
        yield from _conv(f"{torch}.conv{i}", f"{flax}/conv{i}")
    if changes_width:
        yield from _conv(f"{torch}.conv_shortcut", f"{flax}/shortcut")


def _out(torch, flax):
    yield from _norm(f"{torch}.conv_norm_out", f"{flax}/norm_out")
    yield from _conv(f"{torch}.conv_out", f"{flax}/conv_out")


def _conv(torch, flax):
    return [
        (f"{torch}.weight", f"{flax}/kernel", "oihw->hwio"),
        (f"{torch}.bias", f"{flax}/bias", "o->o"),
    ]


def _norm(torch, flax):
    return [
        (f"{torch}.weight", f"{flax}/scale", "o->o"),
        (f"{torch}.bias", f"{flax}/bias", "o->o"),
    ]
