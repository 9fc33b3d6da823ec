"""diffusers' folders of a DiT: config.json and the weights of a DiTTransformer2DModel.

Their names, against the released ones: q, k and v are three tensors, and every block
holds a copy of the embedders of time and label. The table of positions is not stored.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from sit_jax.convert.rules import join_names
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError
from sit_jax.files import as_path, local_path
from sit_jax.models.layers import sincos_pos_embed_2d
from sit_jax.parallel import multihost

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second until 2024
STEM = "diffusion_pytorch_model"
WEIGHTS = (f"{STEM}.safetensors", f"{STEM}.bin")

# Released module -> diffusers'; * is the block. What stands in several blocks is read
# from block 0 and must be the same in all.
_COND = "transformer_blocks.*.norm1.emb"
SHARED = {
    "t_embedder.mlp.0": f"{_COND}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_COND}.timestep_embedder.linear_2",
    "y_embedder.embedding_table": f"{_COND}.class_embedder.embedding_table",
}
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
}
QKV = tuple(f"transformer_blocks.*.attn1.to_{x}" for x in "qkv")

# What the network that these names belong to has no choice in.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def is_folder(path):
    """Whether a path is a folder of a model as diffusers saves it."""
    return _is_model(as_path(path) / "config.json")


def read(path):
    """-> TorchFile of such a folder, under the released names.

    Refused are other networks, missing and spare tensors, and blocks whose copies of
    an embedder differ.
    """
    folder = local_path(path)
    config = _config(folder / "config.json")
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {' and no '.join(WEIGHTS)}")
    multihost.assert_equal_files(file, folder / "config.json")
    found = read_torch_file(file)
    state = Released(file, found.ema, config)
    return dataclasses.replace(
        found,
        layout="diffusers DiTTransformer2DModel",
        model=state,
        ema=state,
        family="dit",
        heads=config["num_attention_heads"],
    )


class Released(Mapping):
    """The tensors of a diffusers file, one read at a time, under the released names."""

    def __init__(self, path, state, config):
        self._state, self.dtypes = state, state.dtypes
        self._sources = _sources(config["num_layers"])
        wanted = {name for names in self._sources.values() for name in names}
        wanted |= {name for _, copy in _copies(config["num_layers"]) for name in copy}
        faults = {
            "missing": sorted(wanted - set(state)),
            "spare": sorted(set(state) - wanted - {"pos_embed.pos_embed"}),
        }
        told = [
            f"{what}: {join_names(names)}" for what, names in faults.items() if names
        ]
        if told:
            raise UserError(f"{path} holds another architecture; {'; '.join(told)}")
        _require_copies(path, state, config["num_layers"])
        patch = config["patch_size"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self._table = sincos_pos_embed_2d(config["sample_size"] // patch, width)[None]
        self.shapes = {"pos_embed": self._table.shape} | {
            name: _joined_shape([state.shapes[source] for source in sources])
            for name, sources in self._sources.items()
        }

    def __getitem__(self, name):
        if name == "pos_embed":
            return self._table
        parts = [self._state[source] for source in self._sources[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def named(state):
    """Released names to arrays -> diffusers' names to arrays, in no special order."""
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    found = {}
    for name, sources in _sources(depth).items():
        parts = np.split(state[name], len(sources))
        found |= dict(zip(sources, parts, strict=True))
    for source, copies in _copies(depth):
        found |= dict.fromkeys(copies, found[source])
    return found


def config_of(model, shape):
    """-> the config.json that DiTTransformer2DModel.from_pretrained makes model of."""
    height, _, channels = shape
    if model.mlp_ratio != 4:
        raise UserError(f"diffusers' DiT has an mlp_ratio of 4, not {model.mlp_ratio}")
    if not model.null_label:
        raise UserError("diffusers' DiT has a row for the null label; this has none")
    return {
        "_class_name": CLASSES[0],
        **FIXED,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": channels,
        "out_channels": channels * (2 if model.learn_sigma else 1),
        "num_layers": model.depth,
        "sample_size": height,
        "patch_size": model.patch,
        "num_embeds_ada_norm": model.classes,
        "dropout": 0.0,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "upcast_attention": False,
    }


def _sources(depth):
    """Released name -> the diffusers names whose tensors make it, from front to end."""
    pairs = {**ENDS, **{n: source.replace("*", "0") for n, source in SHARED.items()}}
    found = {}
    for name, source in pairs.items():
        for part in ("weight",) if name.startswith("y_") else ("weight", "bias"):
            found[f"{name}.{part}"] = (f"{source}.{part}",)
    for i in range(depth):
        for part in ("weight", "bias"):
            qkv = tuple(f"{name}.{part}".replace("*", str(i)) for name in QKV)
            found[f"blocks.{i}.attn.qkv.{part}"] = qkv
            for name, source in BLOCK.items():
                key = f"{name}.{part}".replace("*", str(i))
                found[key] = (f"{source}.{part}".replace("*", str(i)),)
    return found


def _copies(depth):
    """Yields (name in block 0, its names in the other blocks) of each embedder."""
    for name, source in SHARED.items():
        for part in ("weight",) if name.startswith("y_") else ("weight", "bias"):
            first, *others = (
                f"{source}.{part}".replace("*", str(i)) for i in range(depth)
            )
            yield first, others


def _require_copies(path, state, depth):
    for first, others in _copies(depth):
        array = state[first]
        for name in others:
            if not np.array_equal(array, state[name]):
                raise UserError(
                    f"{path}: {name} is not {first}; the released DiT has one embedder "
                    "for all blocks, so this network cannot be written as one"
                )


def _joined_shape(shapes):
    first = shapes[0]
    return (sum(shape[0] for shape in shapes), *first[1:]) if len(shapes) > 1 else first


def _is_model(path):
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "_class_name" in config


def _config(path):
    config = json.loads(path.read_text())
    if config["_class_name"] not in CLASSES:
        name = config["_class_name"]
        raise UserError(f"{path} is of a {name}; {CLASSES[0]} can be read")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{path}: {name} is {config[name]!r}, a DiT has {value!r}")
    defaults = {"num_layers": 28, "sample_size": 32, "patch_size": 2}
    defaults |= {"num_attention_heads": 16, "attention_head_dim": 72}
    config = {**defaults, **config}
    for name in defaults:
        if not isinstance(config[name], int) or config[name] < 1:
            raise UserError(f"{path}: {name} is {config[name]!r}, no positive number")
    if config["sample_size"] % config["patch_size"]:
        raise UserError(
            f"{path}: sample_size {config['sample_size']} is no multiple of patch_size "
            f"{config['patch_size']}"
        )
    return config
