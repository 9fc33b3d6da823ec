"""Adapters in the files of PEFT (0.21) and of diffusers, read and written.

PEFT keeps adapter_model.safetensors and adapter_config.json in a folder, where alpha
stands in the latter alone. diffusers' one file has alpha in its metadata, which older
versions do not read: so what is written for diffusers has scale 1.
"""

import json
import re

import numpy as np

from sit_jax.convert.lora_names import Pair, from_diffusers, to_diffusers
from sit_jax.convert.lora_numbers import require_numbers
from sit_jax.convert.rules import join_names
from sit_jax.convert.tensor_files import Tensors, open_file
from sit_jax.errors import UserError
from sit_jax.files import as_path, local_path, parse_json
from sit_jax.parallel import multihost

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
PREFIXES = ("base_model.model.", "transformer.")
ENDS = {  # of a tensor's name -> what it is; with or without the adapter's name in it
    r"\.lora_A(\.\w+)?\.weight": "down",
    r"\.lora_B(\.\w+)?\.weight": "up",
    r"\.lora\.down\.weight": "down",
    r"\.lora\.up\.weight": "up",
    r"\.lora_embedding_A(\.\w+)?": "down",
    r"\.lora_embedding_B(\.\w+)?": "up",
    r"\.lora_magnitude_vector(\.\w+)?(\.weight)?": "magnitude",
    r"\.alpha": "alpha",
}
TABLE = "y_embedder.embedding_table.weight"  # whole, where classes were added
# what else PEFT's LoRA can do, and the value at which it does not
PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": False,
    "alora_invocation_tokens": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
}
CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that move the base


def is_adapter(path):
    """Whether a path is what read() reads: a folder of PEFT or diffusers, or a file."""
    path = as_path(path)
    return is_adapter_folder(path) or path.suffix == ".safetensors"


def is_adapter_folder(path):
    path = as_path(path)
    return any((path / name).is_file() for name in (CONFIG, WEIGHTS, DIFFUSERS))


def read(path):
    """-> {torch module, by original names: Pair}, dropout, label table or None."""
    path = local_path(path)  # which says what to do with one in a bucket
    file = path
    if path.is_dir():
        names = (WEIGHTS, "adapter_model.bin", DIFFUSERS)
        file = next((path / n for n in names if (path / n).is_file()), None)
        if file is None:
            raise UserError(f"{path} has neither {WEIGHTS} nor {DIFFUSERS}")
    told = file.parent / CONFIG
    beside = [told] if told.is_file() and file.name != DIFFUSERS else []
    config = _config(told) if beside else {}
    multihost.assert_equal_files(file, *beside)
    opened = open_file(file)
    if not opened.is_state_dict(opened.content()):
        raise UserError(f"{file} holds no table of tensors")
    tensors = Tensors(opened, {name: (name,) for name in opened.content()})
    config = config or _metadata(opened)
    modules, table = _modules(file, tensors)
    found = {name: _pair(file, name, parts, config) for name, parts in modules.items()}
    return from_diffusers(found), float(config.get("lora_dropout") or 0), table


def write_peft(folder, found, base, dropout=0.0, table=None):
    """found: {torch module: Pair}; base: name of the base, for the config."""
    prefix, tensors = PREFIXES[0], {}
    for name, pair in found.items():
        is_table = name == TABLE.removesuffix(".weight")
        down, up = (f"lora_{'embedding_' * is_table}{m}" for m in "AB")
        end = "" if is_table else ".weight"
        tensors[f"{prefix}{name}.{down}{end}"] = pair.down
        tensors[f"{prefix}{name}.{up}{end}"] = pair.up
        if pair.magnitude is not None:
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = pair.magnitude
    if table is not None:
        tensors[f"{prefix}{TABLE}"] = table
    config = _peft_config(found, base, dropout)
    config["modules_to_save"] = None if table is None else ["y_embedder"]
    _save(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def write_diffusers(folder, found):
    """found as for write_peft, of a DiT or SiT; all in diffusers' names, of scale 1."""
    named, tensors = to_diffusers(found), {}
    if any(pair.magnitude is not None for pair in named.values()):
        raise UserError("diffusers' files hold no lengths (DoRA); use --adapter peft")
    prefix = PREFIXES[1]
    for name, pair in named.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = pair.down
        tensors[f"{prefix}{name}.lora_B.weight"] = pair.up
    told = {f"{prefix}{k}": v for k, v in _peft_config(named, None, 0.0).items()}
    text = json.dumps(told, sort_keys=True)
    _save(folder / DIFFUSERS, tensors, {"format": "pt", METADATA: text})


def _save(path, tensors, metadata):
    from safetensors.numpy import save

    whole = {name: np.array(t, np.float32, order="C") for name, t in tensors.items()}
    path.write_bytes(save(whole, metadata))


def _peft_config(found, base, dropout):
    ranks = {name: pair.rank for name, pair in found.items()}
    alphas = {name: _number(pair.scale * pair.rank) for name, pair in found.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    exact = lambda names: {f"^{re.escape(n)}": v for n, v in names.items()}
    runs = sorted({re.sub(r"\.\d+\.", ".*.", name, count=1) for name in found})
    runs = [re.escape(run).replace(r"\*", r"\d+") for run in runs]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": exact({n: r for n, r in ranks.items() if r != rank}),
        "alpha_pattern": exact({n: a for n, a in alphas.items() if a != alpha}),
        "target_modules": f"({'|'.join(runs)})",
        "use_dora": any(pair.magnitude is not None for pair in found.values()),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": base,
        "task_type": None,
    }


def _number(value):
    return int(value) if value == int(value) else value


def _config(path):
    try:
        config = parse_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return _checked(path, config)


def _metadata(opened):
    """The config inside diffusers' file; without one alpha is the rank."""
    name = next(iter(opened.content()), None)
    told = (
        opened.content()[name].metadata()
        if name and opened.path.suffix == (".safetensors")
        else None
    )
    if not told or METADATA not in told:
        return {}
    try:
        config = parse_json(told[METADATA])
    except ValueError as error:
        raise UserError(f"{opened.path}: its {METADATA} is not JSON") from error
    prefix = PREFIXES[1]
    if not isinstance(config, dict):
        raise UserError(f"{opened.path}: its {METADATA} is no table")
    plain = {k.removeprefix(prefix): v for k, v in config.items()}
    return _checked(opened.path, {"peft_type": "LORA", **plain})


def _checked(where, config):
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{where}: peft_type is {kind!r}, not 'LORA'")
    for name, plain in PLAIN.items():
        if (value := config.get(name, plain)) not in (plain, None):
            raise UserError(f"{where}: {name} is {value!r}; only {plain!r} is read")
    require_numbers(where, config)
    start = str(config.get("init_lora_weights", True))
    if start.startswith(CHANGED):
        raise UserError(
            f"{where}: init_lora_weights is {start!r}, which also changed the base; "
            "save it with path_initial_model_for_weight_conversion in PEFT"
        )
    return config


def _modules(file, tensors):
    """-> {module: {"down" | "up" | ...: array}}, and the whole label table or None."""
    modules, foreign, table = {}, [], None
    for key in tensors:
        name = key
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name in (TABLE, TABLE.replace(".embed", ".modules_to_save.default.embed")):
            table = tensors[key]
            continue
        for end, what in ENDS.items():
            if match := re.fullmatch(f"(.+?){end}", name):
                modules.setdefault(match[1], {})[what] = tensors[key]
                break
        else:
            foreign.append(key)
    if foreign:
        raise UserError(
            f"{file} has {len(foreign)} tensors that are no adapter's: "
            f"{join_names(foreign, 3)}"
        )
    return modules, table


def _pair(file, name, parts, config):
    if missing := {"down", "up"} - parts.keys():
        raise UserError(f"{file}: {name} has no {missing.pop()} matrix")
    down, up = parts["down"], parts["up"]
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
        raise UserError(f"{file}: {name} is {up.shape} by {down.shape}, no adapter")
    rank = len(down)
    if rank < 1:
        raise UserError(f"{file}: {name} has rank 0")
    told = _matched(config.get("rank_pattern"), name, config.get("r", rank))
    if config.get("r") is not None and told != rank:
        raise UserError(f"{file}: {name} has rank {rank}, the config says {told}")
    alpha = _matched(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    if "alpha" in parts:
        if parts["alpha"].size != 1:
            raise UserError(f"{file}: {name} has {parts['alpha'].size} alphas")
        alpha = float(parts["alpha"].reshape(()))
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Pair(down, up, float(scale), parts.get("magnitude"))


def _matched(patterns, name, default):
    """The value of the first pattern that ends the name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
