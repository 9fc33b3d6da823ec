"""diffusers' folders of a DiT: config.json and weights of a DiTTransformer2DModel.

Their names, against the originals': q, k and v are three tensors, and every block holds
a copy of the embedders of time and label. The table of positions is not stored.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sit_jax.checkpoint import require_same_shapes
from sit_jax.convert.state_dict import TorchFile, read_torch_file
from sit_jax.convert.tensor_files import StateDict
from sit_jax.errors import UserError
from sit_jax.files import as_path, local_path, parse_json
from sit_jax.models.dit import DiT, SiT
from sit_jax.models.layers import sincos_pos_embed_2d
from sit_jax.parallel import multihost

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second until 2024
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
TRANSFORMER = "transformer"  # its folder in a pipeline's

# Originals' module -> diffusers'; * is the block. What stands in several blocks is read
# from block 0 and must be the same in all.
_COND = "transformer_blocks.*.norm1.emb"
SHARED_NAMES = {
    "t_embedder.mlp.0": f"{_COND}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_COND}.timestep_embedder.linear_2",
    "y_embedder.embedding_table": f"{_COND}.class_embedder.embedding_table",
}
END_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK_NAMES = {
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
}
QKV_NAMES = tuple(f"transformer_blocks.*.attn1.to_{x}" for x in "qkv")
# What the network of these names has no choice in.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
SIZES = {  # and diffusers' defaults
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
}


def find_weights(folder: Path) -> Path | None:
    """Returns the weights in a folder as diffusers saves them.

    One file or the index of several; safetensors before .bin; a variant (fp16) last.
    """
    for end in ("safetensors", "bin"):
        for name in (f"{STEM}.{end}", f"{STEM}.{end}.index.json"):
            if (folder / name).is_file():
                return folder / name
        # model.fp16.safetensors; the index of a variant in parts ends in .fp16.json
        variants = sorted(folder.glob(f"{STEM}.*.{end}"))
        if variants := [path for path in variants if "-of-" not in path.name]:
            return variants[0]
    return None


def is_diffusers_folder(path: Any) -> bool:
    """Tells whether a path is diffusers' folder of a model or a pipeline."""
    folder = as_path(path)
    return any(
        "_class_name" in _read_config(parent / "config.json")
        for parent in (folder, folder / TRANSFORMER)
    )


def read_diffusers_folder(path: Any) -> TorchFile:
    """Opens such a folder as a file in the originals' names.

    Raises:
      UserError: it is another network, tensors are missing or spare, or blocks
        differ in their copies of an embedder.
    """
    folder = local_path(path)
    if not (folder / "config.json").is_file():
        folder = folder / TRANSFORMER
    config = _network_config(folder / "config.json")
    file = find_weights(folder)
    if file is None:
        raise UserError(f"{folder} has no {WEIGHTS} and no {STEM}.bin")
    multihost.assert_equal_files(file, folder / "config.json")
    opened = read_torch_file(file)
    state = OriginalNames(file, opened.ema, config)
    return dataclasses.replace(
        opened,
        layout="diffusers DiTTransformer2DModel",
        model=state,
        ema=state,
        family="dit",
        heads=config["num_attention_heads"],
    )


class OriginalNames(StateDict):
    """A diffusers file's tensors, one read at a time, under the originals' names."""

    def __init__(self, path: Path, state: StateDict, config: Mapping[str, Any]):
        self._state, self.dtypes = state, state.dtypes
        depth = config["num_layers"]
        if depth > len(state):  # believed only as far as the file goes
            raise UserError(f"{path} has {len(state)} tensors, for {depth} layers")
        self._sources = _sources(depth)
        expected = {name for names in self._sources.values() for name in names}
        expected |= {name for _, names in _copies(depth) for name in names}
        given = set(state) - {"pos_embed.pos_embed"}
        trees = (dict.fromkeys(sorted(names), 0) for names in (given, expected))
        require_same_shapes(str(path), *trees)
        for first, names in _copies(depth):
            for name in names:
                if not np.array_equal(state[first], state[name]):
                    raise UserError(
                        f"{path}: {name} is not {first}; the released DiT has one "
                        "embedder for all blocks, so this network is no such DiT"
                    )
        self.shapes = {}
        for name, sources in self._sources.items():
            rows = sum(state.shapes[source][0] for source in sources)
            self.shapes[name] = (rows, *state.shapes[sources[0]][1:])
        width = self.shapes["x_embedder.proj.bias"][0]
        if width != config["num_attention_heads"] * config["attention_head_dim"]:
            raise UserError(f"{path} is {width} wide, its config.json says otherwise")
        side = config["sample_size"] // config["patch_size"]
        self._table = sincos_pos_embed_2d(side, width)[None]
        self.shapes["pos_embed"] = self._table.shape

    def __getitem__(self, name):
        if name == "pos_embed":
            return self._table
        parts = [self._state[source] for source in self._sources[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def to_diffusers_state(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a state dict of the originals' names in diffusers' names."""
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    renamed: dict[str, np.ndarray] = {}
    for name, sources in _sources(depth).items():
        parts = np.split(state[name], len(sources))
        renamed |= dict(zip(sources, parts, strict=True))
    for first, names in _copies(depth):
        renamed |= dict.fromkeys(names, renamed[first])
    return renamed


def diffusers_config(model: DiT, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the config.json of which diffusers makes such a network.

    Raises:
      UserError: diffusers has no class for it.
    """
    height, _, channels = shape
    if not isinstance(model, DiT) or isinstance(model, SiT):
        raise UserError(
            f"diffusers has no class for a {type(model).__name__}; "
            "--to released writes a folder with a loader"
        )
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


def _weight_names(name):
    """A module's tensors; a table has no bias."""
    parts = ("weight",) if name.endswith("embedding_table") else ("weight", "bias")
    return [f"{name}.{part}" for part in parts]


def _sources(depth):
    """Originals' name -> the diffusers names whose tensors make it, front to end."""
    modules = {name: (theirs,) for name, theirs in (END_NAMES | SHARED_NAMES).items()}
    modules = {n: (theirs.replace("*", "0"),) for n, (theirs,) in modules.items()}
    blocks = {"blocks.*.attn.qkv": QKV_NAMES}
    blocks |= {name: (theirs,) for name, theirs in BLOCK_NAMES.items()}
    for i in range(depth):
        for name, theirs in blocks.items():
            sources = tuple(source.replace("*", str(i)) for source in theirs)
            modules[name.replace("*", str(i))] = sources
    tensors = {}
    for name, sources in modules.items():
        rows = zip(*map(_weight_names, sources), strict=True)
        tensors |= dict(zip(_weight_names(name), rows, strict=True))
    return tensors


def _copies(depth) -> Iterator[tuple[str, list[str]]]:
    """Yields (name in block 0, its names in the other blocks) of each embedder."""
    for theirs in SHARED_NAMES.values():
        for name in _weight_names(theirs):
            first, *others = (name.replace("*", str(i)) for i in range(depth))
            yield first, others


def _read_config(path):
    try:
        config = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _network_config(path):
    config = _read_config(path)
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UserError(f"{path} is of a {name}; {CLASSES[0]} can be read")
    for field, value in FIXED.items():
        if config.get(field, value) != value:
            raise UserError(
                f"{path}: {field} is {config[field]!r}, a DiT has {value!r}"
            )
    config = {**SIZES, **config}
    for field in SIZES:
        value = config[field]
        if not isinstance(value, int) or not 1 <= value < 2**20:
            raise UserError(f"{path}: {field} is {value!r}, no positive number")
    if config["sample_size"] % config["patch_size"]:
        raise UserError(
            f"{path}: sample_size {config['sample_size']} is no multiple of patch_size "
            f"{config['patch_size']}"
        )
    return config
