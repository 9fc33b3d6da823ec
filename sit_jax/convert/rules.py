"""Tables of rules that move weights between PyTorch state dicts and Flax trees.

A rule is readable in both directions: its layout is an einsum that only reorders axes.
A `*` in the torch name stands for the number of a layer; these layers are stacked along
axis 0 of the Flax array. Neighbouring rules with the same text before the `*` are one
run of layers, and rules stand in the order of torch's own state_dict.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax.errors import UserError
from sit_jax.models.dit import DiT
from sit_jax.models.layers import sincos_pos_embed_2d
from sit_jax.models.mdt import MDT, MDTv2, relative_positions
from sit_jax.models.vae import first_level_of_finish


class WeightRule(NamedTuple):
    """One parameter: ("x_embedder.proj.weight", "patch/kernel", "ocpq->pqco")."""

    torch_name: str
    flax_path: str
    layout: str


Rules = Sequence[WeightRule]


def to_flax(rules: Rules, state: Mapping[str, Any]) -> tuple[dict, set[str]]:
    """Converts a PyTorch state dict into Flax parameters.

    Args:
        rules: the table of the network.
        state: torch names to arrays or CPU tensors. One entry is read at a time.

    Returns:
        The nested dict of numpy arrays, and the names that no rule mentions.

    Raises:
        UserError: entries are missing, or do not have the axes of their rule.
    """
    names_by_rule = torch_names(rules, state)
    known = list(itertools.chain(*names_by_rule))
    if missing := [name for name in known if name not in state]:
        raise UserError(f"weights lack {join_names(missing)}: another architecture?")
    faults, flat = [], {}
    for (torch_name, path, layout), names in zip(rules, names_by_rule, strict=True):
        leaf = _stack_layers(names, state, layout, faults)
        flat[path] = leaf if leaf is None or "*" in torch_name else leaf[0]
    if faults:
        raise UserError(f"weights have unusable entries: {join_names(faults)}")
    return unflatten_dict(flat, sep="/"), set(state) - set(known)


def to_torch(rules: Rules, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts Flax parameters into a state dict, in the order of torch's own.

    Raises:
        UserError: params and rules do not name the same leaves.
    """
    flat = flatten_dict(params, sep="/")
    state = dict.fromkeys(_in_torch_order(rules, flat))
    for torch_name, path, layout in rules:
        theirs, ours = layout.split("->")
        array = np.asarray(flat[path])
        for i, layer in enumerate(array if "*" in torch_name else [array]):
            layer = np.einsum(f"{ours}->{theirs}", layer)
            state[torch_name.replace("*", str(i))] = np.array(layer, order="C")
    return state


def torch_shapes(rules: Rules, flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a state dict, in torch's order.

    Args:
        rules: the table of the network.
        flat: paths of our parameters to anything with a shape.
    """
    shapes = {}
    for torch_name, path, layout in rules:
        theirs, ours = layout.split("->")
        shape = flat[path].shape
        sizes = dict(zip(ours, shape[-len(ours) :], strict=True))
        for name in _layer_names(torch_name, shape[0]):
            shapes[name] = tuple(sizes[axis] for axis in theirs)
    return {name: shapes[name] for name in _in_torch_order(rules, flat)}


def torch_names(rules: Rules, state: Iterable[str]) -> list[list[str]]:
    """Returns the torch names that each rule stands for, with gaps in the layers."""
    depths = {}
    for torch_name, _, _ in rules:
        pattern = re.compile(re.escape(torch_name).replace(r"\*", r"(\d+)"))
        for match in filter(None, map(pattern.fullmatch, state)):
            if match.groups():
                run = _run_of(torch_name)
                depths[run] = max(depths.get(run, 0), int(match[1]) + 1)
    return [_layer_names(name, depths.get(_run_of(name), 1)) for name, _, _ in rules]


def require_match(expected: Mapping, params: Mapping) -> None:
    """Refuses params whose names or shapes are not those of expected."""
    shapes = (
        {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (expected, params)
    )
    if faults := shape_faults(*shapes):
        raise UserError(f"weights are of another architecture; {faults}")


def shape_faults(expected: Mapping[str, tuple], shapes: Mapping[str, tuple]) -> str:
    """Returns what is missing, spare or misshapen as one line; empty if all agree."""
    faults = {
        "missing": [name for name in expected if name not in shapes],
        "spare": [name for name in shapes if name not in expected],
        "misshapen": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    lists = (
        f"{fault}: {join_names(names)}" for fault, names in faults.items() if names
    )
    return "; ".join(lists)


def join_names(names: Sequence[str], most: int = 8) -> str:
    """Returns names in one line, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _stack_layers(
    names: Sequence[str], state: Mapping, layout: str, faults: list[str]
) -> np.ndarray | None:
    """Returns [layers, ...], filled in place so that no layer is held twice."""
    stack, rank = None, layout.index("->")
    for i, name in enumerate(names):
        array = np.asarray(state[name])
        if array.ndim != rank:
            faults.append(f"{name} {array.shape} has not {rank} axes")
            continue
        array = np.einsum(layout, array)
        if stack is None:
            stack, first = np.empty((len(names), *array.shape), array.dtype), name
        if (array.shape, array.dtype) != (stack.shape[1:], stack.dtype):
            faults.append(f"{name} {array.dtype}{array.shape} is not like {first}")
            continue
        stack[i] = array
    return stack


def _count_layers(rules: Rules, flat: Mapping) -> dict[str, int]:
    """Returns the number of layers of each run; flat must be what the rules name."""
    paths = {path for _, path, _ in rules}
    if different := sorted(paths ^ flat.keys()):
        raise UserError(f"weights and rules do not share {join_names(different)}")
    depths = {}
    for torch_name, path, _ in rules:
        depth, run = flat[path].shape[0], _run_of(torch_name)
        if run is not None and depths.setdefault(run, depth) != depth:
            raise UserError(f"{path} has {depth} layers, not {depths[run]}")
    return depths


def _in_torch_order(rules: Rules, flat: Mapping) -> Iterator[str]:
    """Yields torch names with the layers of a run interleaved: all of 0, of 1, ..."""
    depths = _count_layers(rules, flat)
    for run, group in itertools.groupby(rules, lambda rule: _run_of(rule[0])):
        names = [torch_name for torch_name, _, _ in group]
        for i in range(depths.get(run, 1)):
            yield from (name.replace("*", str(i)) for name in names)


def _run_of(torch_name: str) -> str | None:
    before, star, _ = torch_name.partition("*")
    return before if star else None


def _layer_names(torch_name: str, depth: int) -> list[str]:
    if "*" not in torch_name:
        return [torch_name]
    return [torch_name.replace("*", str(i)) for i in range(depth)]


# The networks. Their names are those of the state dicts that were released.


def dense_rules(torch: str, flax: str) -> list[WeightRule]:
    return [
        WeightRule(f"{torch}.weight", f"{flax}/kernel", "oi->io"),
        WeightRule(f"{torch}.bias", f"{flax}/bias", "o->o"),
    ]


def _conv_rules(torch: str, flax: str) -> list[WeightRule]:
    return [
        WeightRule(f"{torch}.weight", f"{flax}/kernel", "oihw->hwio"),
        WeightRule(f"{torch}.bias", f"{flax}/bias", "o->o"),
    ]


def _norm_rules(torch: str, flax: str) -> list[WeightRule]:
    return [
        WeightRule(f"{torch}.weight", f"{flax}/scale", "o->o"),
        WeightRule(f"{torch}.bias", f"{flax}/bias", "o->o"),
    ]


def _block_rules(torch: str, flax: str) -> list[WeightRule]:
    return [
        *dense_rules(f"{torch}.*.attn.qkv", f"{flax}/attn/qkv"),
        *dense_rules(f"{torch}.*.attn.proj", f"{flax}/attn/proj"),
        *dense_rules(f"{torch}.*.mlp.fc1", f"{flax}/mlp/fc1"),
        *dense_rules(f"{torch}.*.mlp.fc2", f"{flax}/mlp/fc2"),
        *dense_rules(f"{torch}.*.adaLN_modulation.1", f"{flax}/adaLN"),
    ]


_EMBEDDERS = [
    WeightRule("x_embedder.proj.weight", "patch/kernel", "ocpq->pqco"),
    WeightRule("x_embedder.proj.bias", "patch/bias", "o->o"),
    *dense_rules("t_embedder.mlp.0", "cond/time_in"),
    *dense_rules("t_embedder.mlp.2", "cond/time_out"),
    WeightRule("y_embedder.embedding_table.weight", "cond/label/embedding", "kd->kd"),
]
_FINAL_LAYER = [
    *dense_rules("final_layer.linear", "head/out"),
    *dense_rules("final_layer.adaLN_modulation.1", "head/adaLN"),
]
DIT_RULES = [*_EMBEDDERS, *_block_rules("blocks", "blocks"), *_FINAL_LAYER]

BIAS_TABLE = "attn.rel_pos_bias.relative_position_bias_table"
BIAS_INDEX = "attn.rel_pos_bias.relative_position_index"


def _mdt_block_rules(torch: str, flax: str) -> list[WeightRule]:
    rules = _block_rules(torch, flax)
    table = WeightRule(f"{torch}.*.{BIAS_TABLE}", f"{flax}/attn/position", "nh->nh")
    return [*rules[:4], table, *rules[4:]]


def _skip_block_rules(torch: str, flax: str) -> list[WeightRule]:
    joining = dense_rules(f"{torch}.*.skip_linear", f"{flax}/skip")
    return [*_mdt_block_rules(torch, flax), *joining]


_MDT_FRONT = [
    WeightRule("pos_embed", "positions", "atd->atd"),
    WeightRule("decoder_pos_embed", "decoder_positions", "atd->atd"),
    WeightRule("mask_token", "hidden_token", "atd->atd"),
    *_EMBEDDERS,
]
_MDT_BACK = [*_mdt_block_rules("sideblocks", "side_blocks"), *_FINAL_LAYER]
MDT_RULES = [*_MDT_FRONT, *_mdt_block_rules("blocks", "blocks"), *_MDT_BACK]
MDTV2_RULES = [
    *_MDT_FRONT,
    *_mdt_block_rules("en_inblocks", "in_blocks"),
    *_skip_block_rules("en_outblocks", "out_blocks"),
    *_skip_block_rules("de_blocks", "decoder_blocks"),
    *_MDT_BACK,
]
_RULES = {MDTv2: MDTV2_RULES, MDT: MDT_RULES, DiT: DIT_RULES}  # subclasses first


def rules_for(model: DiT | MDT) -> Rules:
    """Returns the rules of a SiT, DiT, MDT or MDTv2."""
    return next(rules for kind, rules in _RULES.items() if isinstance(model, kind))


def mdt_family(names: Iterable[str]) -> str | None:
    """Returns mdt or mdtv2 by the names in a torch state dict, None for others."""
    if any(name.startswith("en_inblocks.") for name in names):
        return "mdtv2"
    return "mdt" if f"blocks.0.{BIAS_TABLE}" in names else None


def torch_constants(model: DiT | MDT, side: int) -> dict[str, np.ndarray]:
    """Returns what torch files hold and our parameters do not.

    Args:
        model: the network.
        side: height and width of its data.

    Returns:
        Torch names to tables: positions for DiT and SiT, bias indices for MDT.
    """
    if not isinstance(model, MDT):
        return {
            "pos_embed": sincos_pos_embed_2d(side // model.patch, model.width)[None]
        }
    index = relative_positions(side // model.patch)
    half = (model.depth - model.decoder) // 2
    runs = {"blocks": model.depth}
    if isinstance(model, MDTv2):
        runs = {"en_inblocks": half, "en_outblocks": half, "de_blocks": model.decoder}
    runs["sideblocks"] = 1
    names = [f"{run}.{i}" for run, depth in runs.items() for i in range(depth)]
    return {f"{name}.{BIAS_INDEX}": index for name in names}


# The autoencoder of Stable Diffusion. Its weights exist under three sets of names: of
# today's diffusers, which the rules use, of diffusers before 0.16 (in which ft-mse and
# ft-ema were released), and of CompVis' latent-diffusion.

_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
# CompVis -> diffusers, tried in this order. CompVis' decoder counts resolutions the
# other way round: {i} is to be counted down from the highest.
_COMPVIS = [
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


def vae_rules(model) -> Rules:
    """Returns the rules of an AutoencoderKL, in diffusers' names of today."""
    return [
        *_vae_encoder(model),
        *_vae_decoder(model),
        *_conv_rules("quant_conv", "encoder/quant"),
        *_conv_rules("post_quant_conv", "decoder/begin/post_quant"),
    ]


def to_diffusers_names(names: Iterable[str], levels: int) -> dict[str, str]:
    """Returns today's diffusers names of a VAE's tensors -> the names given.

    Args:
        names: of today's or older diffusers, or of CompVis.
        levels: number of resolutions.
    """
    translation = {}
    for given in names:
        name = given
        for pattern, new in _COMPVIS:
            name = re.sub(pattern, new, name)
        name = re.sub(r"\{(\d+)\}", lambda level: str(levels - 1 - int(level[1])), name)
        name = re.sub(
            rf"\.attentions\.0\.({'|'.join(_OLD_ATTENTION)})\.",
            lambda old: f".attentions.0.{_OLD_ATTENTION[old[1]]}.",
            name,
        )
        if name in translation:
            raise UserError(f"the weights name {name} twice, also as {given}")
        translation[name] = given
    return translation


def squeeze_attention(name: str, array: np.ndarray) -> np.ndarray:
    """Returns attention weights kept as a 1 x 1 convolution [o, i, 1, 1] as [o, i]."""
    is_attention = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name)
    if is_attention and array.shape[2:] == (1, 1):
        return array[..., 0, 0]
    return array


def _vae_encoder(model) -> Iterator[WeightRule]:
    torch, flax = "encoder", "encoder"
    yield from _conv_rules(f"{torch}.conv_in", f"{flax}/conv_in")
    before = model.channels[0]
    for i, width in enumerate(model.channels):
        level = f"{torch}.down_blocks.{i}"
        for j in range(model.layers):
            changes, before = width != before, width
            yield from _vae_residual(
                f"{level}.resnets.{j}", f"{flax}/down_{i}_{j}", changes
            )
        if i < len(model.channels) - 1:
            yield from _conv_rules(f"{level}.downsamplers.0.conv", f"{flax}/halve_{i}")
    yield from _vae_middle(torch, flax)
    yield from _vae_out(torch, flax)


def _vae_decoder(model) -> Iterator[WeightRule]:
    torch, last = "decoder", len(model.channels) - 1
    first = first_level_of_finish(model.channels)
    part = lambda level: f"decoder/{'begin' if level < first else 'finish'}"
    yield from _conv_rules(f"{torch}.conv_in", "decoder/begin/conv_in")
    before = model.channels[-1]
    for i, width in enumerate(reversed(model.channels)):
        level = f"{torch}.up_blocks.{i}"
        for j in range(model.layers + 1):
            changes, before = width != before, width
            flax = f"{part(i)}/up_{i}_{j}"
            yield from _vae_residual(f"{level}.resnets.{j}", flax, changes)
        if i < last:
            flax = f"{part(i + 1)}/double_{i + 1}"
            yield from _conv_rules(f"{level}.upsamplers.0.conv", flax)
    yield from _vae_middle(torch, "decoder/begin")
    yield from _vae_out(torch, "decoder/finish")


def _vae_middle(torch: str, flax: str) -> Iterator[WeightRule]:
    torch, flax = f"{torch}.mid_block", f"{flax}/middle"
    attention = f"{torch}.attentions.0"
    yield from _norm_rules(f"{attention}.group_norm", f"{flax}/attention/norm")
    for name in "qkv":
        yield from dense_rules(f"{attention}.to_{name}", f"{flax}/attention/{name}")
    yield from dense_rules(f"{attention}.to_out.0", f"{flax}/attention/out")
    yield from _vae_residual(f"{torch}.resnets.0", f"{flax}/before")
    yield from _vae_residual(f"{torch}.resnets.1", f"{flax}/after")


def _vae_residual(torch: str, flax: str, changes_width=False) -> Iterator[WeightRule]:
    for i in (1, 2):
        yield from _norm_rules(f"{torch}.norm{i}", f"{flax}/norm{i}")
        yield from _conv_rules(f"{torch}.conv{i}", f"{flax}/conv{i}")
    if changes_width:
        yield from _conv_rules(f"{torch}.conv_shortcut", f"{flax}/shortcut")


def _vae_out(torch: str, flax: str) -> Iterator[WeightRule]:
    yield from _norm_rules(f"{torch}.conv_norm_out", f"{flax}/norm_out")
    yield from _conv_rules(f"{torch}.conv_out", f"{flax}/conv_out")
