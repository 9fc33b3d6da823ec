"""Tables of rules that move weights between PyTorch state dicts and Flax trees.

A rule is readable in both directions: its layout is an einsum that only reorders axes.
A `*` in the torch name stands for the number of a layer; these layers are stacked along
axis 0 of the Flax array. Neighbouring rules with the same text before the `*` are one
run of layers, and rules stand in the order of torch's own state_dict.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax.errors import UserError
from sit_jax.models.dit import DiT
from sit_jax.models.layers import sincos_pos_embed_2d
from sit_jax.models.mdt import MDT, MDTv2, relative_positions
from sit_jax.models.vae import AutoencoderKL


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
    faults: list[str] = []
    flat = {}
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
    state: dict[str, Any] = dict.fromkeys(_in_torch_order(rules, flat))
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
    depths: dict[str | None, int] = {}
    for torch_name, _, _ in rules:
        pattern = re.compile(re.escape(torch_name).replace(r"\*", r"(\d+)"))
        for match in filter(None, map(pattern.fullmatch, state)):
            if match.groups():
                run = _run_of(torch_name)
                depths[run] = max(depths.get(run, 0), int(match[1]) + 1)
    return [_layer_names(name, depths.get(_run_of(name), 1)) for name, _, _ in rules]


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


def _count_layers(rules: Rules, flat: Mapping) -> dict[str | None, int]:
    """Returns the number of layers of each run; flat must be what the rules name."""
    paths = {path for _, path, _ in rules}
    if different := sorted(paths ^ flat.keys()):
        raise UserError(f"weights and rules do not share {join_names(different)}")
    depths: dict[str | None, int] = {}
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

# Old diffusers' and CompVis' names -> today's, tried in this order. CompVis' decoder
# counts resolutions the other way round: {i} is to be counted down from the highest.
_OLD_NAMES = [
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
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


# Our modules -> diffusers', tried in this order.
_VAE_NAMES = [
    (r"encoder/quant", "quant_conv"),
    (r"decoder/begin/post_quant", "post_quant_conv"),
    (r"decoder/(begin|finish)", "decoder"),
    (r"down_(\d+)_(\d+)", r"down_blocks/\1/resnets/\2"),
    (r"halve_(\d+)", r"down_blocks/\1/downsamplers/0/conv"),
    (r"up_(\d+)_(\d+)", r"up_blocks/\1/resnets/\2"),
    (r"middle/before", "mid_block/resnets/0"),
    (r"middle/after", "mid_block/resnets/1"),
    (r"middle/attention/norm", "mid_block/attentions/0/group_norm"),
    (r"middle/attention/out", "mid_block/attentions/0/to_out/0"),
    (r"middle/attention/([qkv])", r"mid_block/attentions/0/to_\1"),
    (r"/norm_out", "/conv_norm_out"),
    (r"/shortcut", "/conv_shortcut"),
    (r"/(kernel|scale)$", "/weight"),
]
_VAE_ORDER = (  # of names within a module, as torch registers them
    "encoder decoder quant_conv post_quant_conv conv_in down_blocks up_blocks "
    "mid_block attentions group_norm to_q to_k to_v to_out resnets norm1 conv1 norm2 "
    "conv2 conv_shortcut downsamplers upsamplers conv conv_norm_out conv_out "
    "weight bias"
).split()
_LAYOUTS = {1: "o->o", 2: "oi->io", 4: "oihw->hwio"}  # by the number of axes
MAX_LEVELS = 8  # of a VAE; a config's word about sizes is a stranger's


@functools.cache
def vae_param_shapes(model: AutoencoderKL) -> dict:
    """Returns the shapes of a VAE's parameters."""
    if len(model.channels) > MAX_LEVELS:
        raise UserError(f"{len(model.channels)} levels are no VAE's: more than 8")
    image = jax.ShapeDtypeStruct((1, model.factor, model.factor, 3), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def vae_rules(model: AutoencoderKL) -> Rules:
    """Returns the rules of an AutoencoderKL, in diffusers' names of today."""
    rules = []
    for path, leaf in flatten_dict(vae_param_shapes(model), sep="/").items():
        name = _rename(path, _VAE_NAMES)
        # The upsampler of a level stands with the level below in diffusers.
        double = lambda match: f"up_blocks/{int(match[1]) - 1}/upsamplers/0/conv"
        name = re.sub(r"double_(\d+)", double, name)
        rules.append(WeightRule(name.replace("/", "."), path, _LAYOUTS[leaf.ndim]))
    rank = lambda word: int(word) if word.isdigit() else _VAE_ORDER.index(word)
    return sorted(rules, key=lambda rule: [*map(rank, rule.torch_name.split("."))])


def to_diffusers_names(names: Iterable[str], levels: int) -> dict[str, str]:
    """Returns today's diffusers names of a VAE's tensors -> the names given.

    Args:
        names: of today's or older diffusers, or of CompVis.
        levels: number of resolutions.
    """
    translation = {}
    for old in names:
        name = _rename(old, _OLD_NAMES)
        name = re.sub(r"\{(\d+)\}", lambda level: str(levels - 1 - int(level[1])), name)
        if name in translation:
            raise UserError(f"the weights name {name} twice, also as {old}")
        translation[name] = old
    return translation


def _rename(name, patterns):
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name


def squeeze_attention(name: str, array: np.ndarray) -> np.ndarray:
    """Returns attention weights kept as a 1 x 1 convolution [o, i, 1, 1] as [o, i]."""
    is_attention = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name)
    if is_attention and array.shape[2:] == (1, 1):
        return array[..., 0, 0]
    return array
