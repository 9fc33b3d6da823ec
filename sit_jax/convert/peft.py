"""Adapters in the files of PEFT (0.21) and of diffusers, both ways.

PEFT keeps adapter_model.safetensors and adapter_config.json in a folder; alpha stands
in the latter alone. diffusers' one file has alpha in its metadata, which its older
versions do not read: so what is written for diffusers has scale 1.

Between the files and our parameters stands {torch module: LoRAPair}, in the originals'
names. diffusers' DiT has three modules where the originals have one for q, k and v.
Both ways are exact: split, the three share lora_a and each has its rows of lora_b;
joined, the ranks add up, and lora_b is made of blocks.
"""

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float

from sit_jax.adapters.weights import (
    PATTERN_SECONDS,
    LoRAWeight,
    full_matches,
    is_matrix,
)
from sit_jax.convert.diffusers import BLOCK_NAMES, END_NAMES, QKV_NAMES
from sit_jax.convert.rules import Rules, join_names
from sit_jax.convert.tensor_files import Tensors, open_file
from sit_jax.errors import UserError
from sit_jax.files import as_path, local_path, parse_json, read_json
from sit_jax.parallel import multihost

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
TABLE_MODULE = "y_embedder.embedding_table"
# The whole label table, where classes were added; PEFT of today, and of before 0.18.
TABLES = (
    f"{TABLE_MODULE}.weight",
    "y_embedder.modules_to_save.default.embedding_table.weight",
)
ENDS = {  # of a tensor's name, with or without the adapter's name in it
    r"\.lora_(embedding_)?A(\.\w+)??(\.weight)?": "lora_a",
    r"\.lora_(embedding_)?B(\.\w+)??(\.weight)?": "lora_b",
    r"\.lora\.down\.weight": "lora_a",
    r"\.lora\.up\.weight": "lora_b",
    r"\.lora_magnitude_vector(\.\w+)??(\.weight)?": "magnitude",
    r"\.alpha": "alpha",
}
# What else PEFT's LoRA can do; of another value than these, a file is refused.
UNSUPPORTED = dict.fromkeys(
    "fan_in_fan_out lora_bias layer_replication trainable_token_indices "
    "target_parameters use_qalora use_bdlora alora_invocation_tokens kasa_config "
    "velora_config monteclora_config".split(),
    False,
) | {"bias": "none"}
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
NUMBER_LIMIT = 1e6
DIFFUSERS_MODULES = BLOCK_NAMES | END_NAMES
QKV = "blocks.*.attn.qkv"


@dataclasses.dataclass(frozen=True)
class LoRAPair:
    """W + scale * lora_b @ lora_a of a torch weight, its rows of length `magnitude`."""

    lora_a: Float[np.ndarray, "rank i"]
    lora_b: Float[np.ndarray, "o rank"]
    scale: float = 1.0
    magnitude: Float[np.ndarray, " o"] | None = None

    @property
    def rank(self) -> int:
        """Inner size of the two matrices."""
        return len(self.lora_a)

    @property
    def size(self) -> tuple[int, int]:
        """Sizes of the weight, output and input."""
        return len(self.lora_b), self.lora_a.shape[1]

    def with_scale(self, scale: float) -> "LoRAPair":
        """Returns the same with another scale, to the rounding of one product."""
        if scale == self.scale:
            return self
        lora_b = (self.lora_b * np.float32(self.scale / scale)).astype(np.float32)
        return dataclasses.replace(self, lora_b=lora_b, scale=scale)

    def with_rank(self, rank: int) -> "LoRAPair":
        """Returns the same with rows and columns of zeros up to a rank."""
        more = (0, rank - self.rank)
        lora_a = np.pad(self.lora_a, (more, (0, 0)))
        lora_b = np.pad(self.lora_b, ((0, 0), more))
        return dataclasses.replace(self, lora_a=lora_a, lora_b=lora_b)


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's files hold.

    pairs: by the originals' names of modules. table: the whole label table [K, D],
    where classes were added.
    """

    pairs: dict[str, LoRAPair]
    dropout: float = 0.0
    table: Float[np.ndarray, "k d"] | None = None


def is_adapter_folder(path: Any) -> bool:
    """Tells whether a path is a folder of PEFT's or diffusers' adapter files."""
    folder = as_path(path)
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS, DIFFUSERS))


def is_adapter_file(path: Any) -> bool:
    """Tells whether read_adapter_files reads a path: such a folder, or a file."""
    return is_adapter_folder(path) or as_path(path).suffix == ".safetensors"


def read_adapter_files(path: Any) -> AdapterFiles:
    """Reads a folder of PEFT or diffusers, or a .safetensors.

    Raises:
      UserError: it holds other tensors, or settings that only PEFT has.
    """
    path = local_path(path)
    file = path
    if path.is_dir():
        names = (WEIGHTS, "adapter_model.bin", DIFFUSERS)
        file = next((path / n for n in names if (path / n).is_file()), None)
        if file is None:
            raise UserError(f"{path} has neither {WEIGHTS} nor {DIFFUSERS}")
    config_file = file.parent / CONFIG
    if file.name == DIFFUSERS or not config_file.is_file():
        config_file = None
    multihost.assert_equal_files(file, *filter(None, [config_file]))
    opened = open_file(file)
    if not opened.is_state_dict(opened.content()):
        raise UserError(f"{file} holds no table of tensors")
    tensors = Tensors(opened, {name: (name,) for name in opened.content()})
    config = _read_config(file, config_file, opened.metadata().get(METADATA))
    modules, table = _group_by_module(file, tensors)
    ranks = _by_pattern(config.get("rank_pattern"), modules, config.get("r"))
    alphas = _by_pattern(config.get("alpha_pattern"), modules, config.get("lora_alpha"))
    pairs = {}
    for name, module in modules.items():
        pair = _pair(f"{file}: {name}", module, ranks[name], alphas[name])
        if config.get("use_rslora"):
            pair = dataclasses.replace(pair, scale=pair.scale * pair.rank**0.5)
        pairs[name] = pair
    dropout = float(config.get("lora_dropout") or 0)
    return AdapterFiles(from_diffusers(pairs), dropout, table)


def write_peft(
    folder: Path,
    pairs: Mapping[str, LoRAPair],
    base: str | None,
    *,
    dropout: float = 0.0,
    table: Float[np.ndarray, "k d"] | None = None,
) -> None:
    """Writes PEFT's two files; base: name of the base, for the config."""
    tensors = {}
    for name, pair in pairs.items():
        infix, end = ("embedding_", "") if name == TABLE_MODULE else ("", ".weight")
        tensors[f"{PREFIX}{name}.lora_{infix}A{end}"] = pair.lora_a
        tensors[f"{PREFIX}{name}.lora_{infix}B{end}"] = pair.lora_b
        if pair.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
    if table is not None:
        tensors[f"{PREFIX}{TABLES[0]}"] = table
    config = _peft_config(pairs, base, dropout)
    config["modules_to_save"] = None if table is None else ["y_embedder"]
    _save(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def write_diffusers(folder: Path, pairs: Mapping[str, LoRAPair]) -> None:
    """Writes diffusers' file of pairs of a DiT or SiT, in its names and of scale 1."""
    named, tensors = to_diffusers(pairs), {}
    if any(pair.magnitude is not None for pair in named.values()):
        raise UserError("diffusers' files hold no lengths (DoRA); use --adapter peft")
    for name, pair in named.items():
        tensors[f"{DIFFUSERS_PREFIX}{name}.lora_A.weight"] = pair.lora_a
        tensors[f"{DIFFUSERS_PREFIX}{name}.lora_B.weight"] = pair.lora_b
    config = _peft_config(named, None, 0.0)
    config = {f"{DIFFUSERS_PREFIX}{name}": value for name, value in config.items()}
    metadata = {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
    _save(folder / DIFFUSERS, tensors, metadata)


def to_pairs(rules: Rules, flat: Mapping[str, Any]) -> dict[str, LoRAPair]:
    """Returns our adapters by path as {torch module: LoRAPair}, in the rules' order."""
    pairs = {}
    for torch_name, path, _ in rules:
        node = flat.get(path)
        if not isinstance(node, LoRAWeight):
            continue
        module, magnitude = torch_name.removesuffix(".weight"), node.magnitude
        for i in range(len(node.lora_a) if "*" in torch_name else 1):
            layer = i if "*" in torch_name else ...
            lora_a, lora_b = (
                np.asarray(x)[layer].T for x in (node.lora_a, node.lora_b)
            )
            pairs[module.replace("*", str(i))] = LoRAPair(
                lora_a,
                lora_b,
                node.scale,
                None if magnitude is None else np.asarray(magnitude)[layer],
            )
    return pairs


def from_pairs(
    rules: Rules, shapes: Mapping[str, Any], pairs: Mapping[str, LoRAPair], source: Any
) -> dict[str, LoRAWeight]:
    """Returns {torch module: LoRAPair} as our adapters by path, without a base.

    All get the largest rank and one scale; a layer that has none gets zeros.

    Args:
      rules: of the network.
      shapes: of the base's parameters, by path.
      pairs: what source holds.
      source: for errors.

    Raises:
      UserError: they are of another network.
    """
    rank = max(pair.rank for pair in pairs.values())
    scale, left, flat = next(iter(pairs.values())).scale, dict(pairs), {}
    for torch_name, path, _ in rules:
        if not is_matrix(path):
            continue
        module = torch_name.removesuffix(".weight")
        *lead, fan_in, fan_out = shapes[path].shape
        names = [module.replace("*", str(i)) for i in range(lead[0] if lead else 1)]
        if left.keys().isdisjoint(names):
            continue
        zero = zero_pair(fan_out, fan_in)
        layers = [left.pop(name, zero) for name in names]
        for name, pair in zip(names, layers, strict=True):
            if pair.size != zero.size:
                raise UserError(
                    f"{source} is for another network: {name} is {pair.size} there, "
                    f"{zero.size} here"
                )
        magnitude = _join_magnitudes(f"{source}: {module}", layers)
        layers = [pair.with_scale(scale).with_rank(rank) for pair in layers]
        lora_a: Any = np.stack([pair.lora_a.T for pair in layers])
        lora_b: Any = np.stack([pair.lora_b.T for pair in layers])
        flat[path] = LoRAWeight(
            base=None,
            lora_a=lora_a.reshape(*lead, fan_in, rank),
            lora_b=lora_b.reshape(*lead, rank, fan_out),
            magnitude=None if magnitude is None else magnitude.reshape(*lead, fan_out),
            scale=scale,
        )
    if left:
        raise UserError(
            f"{source} is for another network: this one has no {join_names([*left], 3)}"
        )
    return flat


def to_diffusers(pairs: Mapping[str, LoRAPair]) -> dict[str, LoRAPair]:
    """Returns pairs by diffusers' names of a DiT's modules, all of scale 1."""
    named = {}
    for name, pair in pairs.items():
        pattern, layer = _pattern(name)
        pair = pair.with_scale(1.0)
        if pattern == QKV:
            for theirs, part in zip(QKV_NAMES, _split_qkv(pair), strict=True):
                named[theirs.replace("*", layer)] = part
        elif pattern in DIFFUSERS_MODULES:
            named[DIFFUSERS_MODULES[pattern].replace("*", layer)] = pair
        else:
            raise UserError(
                f"diffusers' DiT has no one module for {name}; write PEFT's files "
                "(--adapter peft), which keep the originals' names"
            )
    return named


def from_diffusers(pairs: Mapping[str, LoRAPair]) -> dict[str, LoRAPair]:
    """Returns pairs by the originals' names; other names than diffusers' stay."""
    ours = {theirs: name for name, theirs in DIFFUSERS_MODULES.items()}
    named: dict[str, LoRAPair] = {}
    parts: dict[str, dict[int, LoRAPair]] = {}
    for name, pair in pairs.items():
        pattern, layer = _pattern(name)
        if pattern in QKV_NAMES:
            module = QKV.replace("*", layer)
            parts.setdefault(module, {})[QKV_NAMES.index(pattern)] = pair
        else:
            named[ours.get(pattern, pattern).replace("*", layer)] = pair
    return named | {name: _join_qkv(name, three) for name, three in parts.items()}


def _pattern(name):
    """Returns a module's name with * for the layer, and the layer."""
    match = re.match(r"(\w*blocks)\.(\d+)\.", name)
    if not match:
        return name, ""
    return f"{match[1]}.*.{name[match.end() :]}", match[2]


def _split_qkv(pair):
    lora_b = np.split(pair.lora_b, 3)
    lengths = [None] * 3 if pair.magnitude is None else np.split(pair.magnitude, 3)
    return [
        dataclasses.replace(pair, lora_b=rows, magnitude=length)
        for rows, length in zip(lora_b, lengths, strict=True)
    ]


def _join_qkv(name, parts):
    """Joins {0: q, 1: k, 2: v}, of which some may lack, to the fused module's pair."""
    first = next(iter(parts.values()))
    zero = zero_pair(*first.size)
    pairs = [parts.get(i, zero).with_scale(first.scale) for i in range(3)]
    if any(pair.size != first.size for pair in pairs):
        raise UserError(f"{name}: the adapters of q, k and v differ in size")
    if all(np.array_equal(pair.lora_a, first.lora_a) for pair in pairs):
        lora_a, lora_b = first.lora_a, np.concatenate([pair.lora_b for pair in pairs])
    else:
        lora_a = np.concatenate([pair.lora_a for pair in pairs])
        lora_b = scipy.linalg.block_diag(*(pair.lora_b for pair in pairs))
    return LoRAPair(lora_a, lora_b, first.scale, _join_magnitudes(name, pairs))


def zero_pair(fan_out: int, fan_in: int) -> LoRAPair:
    """Returns a pair of rank 0, which changes nothing."""
    return LoRAPair(np.zeros((0, fan_in), "f4"), np.zeros((fan_out, 0), "f4"))


def _join_magnitudes(name, pairs):
    lengths = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    if lengths and len(lengths) < len(pairs):
        raise UserError(f"{name} has lengths (DoRA) in some of its parts only")
    return np.concatenate(lengths) if lengths else None


def _save(path, tensors, metadata):
    from safetensors.numpy import save

    arrays = {name: np.array(t, np.float32, order="C") for name, t in tensors.items()}
    path.write_bytes(save(arrays, metadata))  # save_file would not let others read it


def _peft_config(pairs, base, dropout):
    ranks = {name: pair.rank for name, pair in pairs.items()}
    alphas = {name: pair.scale * pair.rank for name, pair in pairs.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    exact = lambda values: {f"^{re.escape(n)}": v for n, v in values.items()}
    patterns = sorted({re.sub(r"\.\d+\.", ".*.", name, count=1) for name in pairs})
    patterns = [re.escape(name).replace(r"\*", r"\d+") for name in patterns]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": exact({n: r for n, r in ranks.items() if r != rank}),
        "alpha_pattern": exact({n: a for n, a in alphas.items() if a != alpha}),
        "target_modules": f"({'|'.join(patterns)})",
        "use_dora": any(pair.magnitude is not None for pair in pairs.values()),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": base,
        "task_type": None,
    }


def _read_config(file, config_file, metadata):
    """Returns the settings beside a file or in its metadata; of neither, none."""
    if config_file is not None:
        return _check_config(config_file, read_json(config_file))
    if metadata is None:  # alpha is the rank
        return {}
    try:
        config = parse_json(metadata).items()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: its {METADATA} is no JSON object") from error
    plain = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in config}
    return _check_config(file, {"peft_type": "LORA", **plain})


def _check_config(source, config):
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{source}: peft_type is {kind!r}, not 'LORA'")
    for name, plain in UNSUPPORTED.items():
        if (value := config.get(name, plain)) not in (plain, None):
            raise UserError(f"{source}: {name} is {value!r}; only {plain!r} is read")
    numbers = [config.get(name) for name in ("r", "lora_alpha", "lora_dropout")]
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(patterns := config.get(name) or {}, dict):
            raise UserError(f"{source}: {name} is no table")
        numbers += patterns.values()
    for value in numbers:
        is_number = isinstance(value, int | float | None)
        if not is_number or not abs(value or 0) < NUMBER_LIMIT:
            raise UserError(f"{source}: {str(value)[:50]!r} stands where a number must")
    init = str(config.get("init_lora_weights", True))
    if init.startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"{source}: init_lora_weights is {init!r}, which also changed the base; "
            "save it with path_initial_model_for_weight_conversion in PEFT"
        )
    return config


def _group_by_module(file, tensors):
    """Returns {module: {"lora_a": array, ...}}, and the label table or None."""
    modules, foreign, table = {}, [], None
    for key in tensors:
        name = key.removeprefix(PREFIX).removeprefix(DIFFUSERS_PREFIX)
        if name in TABLES:
            table = tensors[key]
            continue
        for end, part in ENDS.items():
            if match := re.fullmatch(f"(?P<module>.+?){end}", name):
                modules.setdefault(match["module"], {})[part] = tensors[key]
                break
        else:
            foreign.append(key)
    if foreign:
        names = join_names(foreign, 3)
        raise UserError(
            f"{file} has {len(foreign)} tensors that are no adapter's: {names}"
        )
    return modules, table


def _pair(source, tensors, expected_rank, alpha):
    """Returns the LoRAPair of one module's tensors; source names it in errors."""
    if missing := {"lora_a", "lora_b"} - tensors.keys():
        raise UserError(f"{source} has no {missing.pop().replace('_', ' ')} matrix")
    lora_a, lora_b = tensors["lora_a"], tensors["lora_b"]
    if lora_a.ndim != 2 or lora_b.ndim != 2 or len(lora_a) != lora_b.shape[1]:
        raise UserError(f"{source} is {lora_b.shape} by {lora_a.shape}, no adapter")
    rank = len(lora_a)
    if rank < 1:
        raise UserError(f"{source} has rank 0")
    if expected_rank not in (None, rank):
        raise UserError(f"{source} has rank {rank}, the config says {expected_rank}")
    if "alpha" in tensors:
        if tensors["alpha"].size != 1:
            raise UserError(f"{source} has {tensors['alpha'].size} alphas")
        alpha = tensors["alpha"].item()
    scale = 1.0 if alpha is None else alpha / rank
    return LoRAPair(lora_a, lora_b, float(scale), tensors.get("magnitude"))


def _by_pattern(patterns, names, default):
    """Returns {name: value of the first pattern that ends it}, as in PEFT."""
    values, deadline = dict.fromkeys(names, default), time.monotonic() + PATTERN_SECONDS
    for pattern, value in reversed((patterns or {}).items()):
        left = deadline - time.monotonic()
        for name in full_matches(rf"(.*\.)?({pattern})", names, left):
            values[name] = value
    return values
