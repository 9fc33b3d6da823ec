"""Infers the config of a torch file, and gives the originals' args for a config.

Shapes determine the network but for its family and heads. The args that the originals'
train.py saves beside the weights determine the process and the settings of the run.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import optax

from sit_jax.config import build, difference, spec, to_json
from sit_jax.convert.optimizer import ADAM
from sit_jax.convert.rules import BIAS_TABLE, mdt_family
from sit_jax.convert.state_dict import TorchFile
from sit_jax.diffusion import paths, predictions
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.loss_weights import (
    likelihood_weight,
    unweighted,
    velocity_weight,
)
from sit_jax.errors import UserError
from sit_jax.models.dit import SIZES
from sit_jax.recipes import published
from sit_jax.training.optimizers import adan

FAMILIES = ("sit", "dit")  # whose weights look alike

PATHS = {"Linear": paths.linear, "GVP": paths.gvp, "VP": paths.VP()}
PREDICTIONS = {
    "velocity": predictions.velocity,
    "score": predictions.score,
    "noise": predictions.noise,
}
WEIGHTS = {
    None: unweighted,
    "None": unweighted,
    "velocity": velocity_weight,
    "likelihood": likelihood_weight,
}
PROCESS = {  # of SiT's args -> fields of an Interpolant
    "path_type": ("path", PATHS),
    "prediction": ("prediction", PREDICTIONS),
    "loss_weight": ("loss_weight", WEIGHTS),
}
SETTINGS = {  # of the originals' args -> ours
    "global_batch_size": "batch_size",
    "global_seed": "seed",
    "log_every": "log_every",
    "ckpt_every": "save_every",
}
SIT_SETTINGS = {"sample_every": "sample_every", "cfg_scale": "guidance"}
_CHECKED = ("model", "process", "shape")
_X_EMBEDDER = "x_embedder.proj.weight"
_LABELS = "y_embedder.embedding_table.weight"
_FINAL_LAYER = "final_layer.linear.weight"
_PUBLISHED_HEADS = {(s["depth"], s["width"]): s["heads"] for s in SIZES.values()}


def infer_config(
    file: TorchFile,
    *,
    family: str | None = None,
    heads: int | None = None,
    config: Any = None,
) -> Any:
    """Returns the training config of a torch file.

    Args:
        file: the opened file.
        family: of the network, where the file does not tell it.
        heads: of its attention, likewise.
        config: kept as it is and compared with the file; else it is the published
            run's of the family, with another network.

    Raises:
        UserError: family or heads are unknown, or sources contradict each other.
    """
    args, network = file.args or {}, _describe(file)
    family = _infer_family(file, args, family, config)
    network["heads"] = _infer_heads(file, network, heads, config)
    is_given = config is not None
    config = config if is_given else published(family)
    before = to_json({name: config[name] for name in _CHECKED})
    try:
        _set_network(config, network, args, is_given)
        if family == "sit" and "path_type" in args:
            config.process = _process(args)
        if not is_given:
            _set_run(config, args, file)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file.path}: args not understood ({error!r})") from error
    after = to_json({name: config[name] for name in _CHECKED})
    if is_given and (unlike := difference(before, after)):
        pairs = "; ".join(f"{n} is {a}, the weights say {b}" for n, a, b in unlike)
        raise UserError(f"the config does not fit {file.path}: {pairs}")
    return config


def train_args(config: Any) -> dict[str, Any]:
    """Returns the args of the originals' train.py for a run of this config."""
    model, family = config.model, config.model.make.__name__
    sizes = (n for n, size in SIZES.items() if all(model[k] == size[k] for k in size))
    args = {
        "data_path": "",
        "results_dir": "results",
        "model": f"{family}-{next(sizes, 'custom')}/{model.patch}",
        "image_size": 8 * config.shape[0],
        "num_classes": model.classes,
        "epochs": 1400,
        "vae": "ema",
        "num_workers": 4,
        **{theirs: config[ours] for theirs, ours in SETTINGS.items()},
    }
    process = build(config.process)
    if family != "SiT" or not isinstance(process, Interpolant):
        return args
    for theirs, (field, table) in PROCESS.items():
        args[theirs] = _name_of(getattr(process, field), table)
    return args | {
        "sample_every": config.sample_every,
        "cfg_scale": float(getattr(config.guidance, "scale", config.guidance)),
        "wandb": False,
        "ckpt": None,
        "sample_eps": process.sample_eps,
        "train_eps": process.train_eps,
    }


def describe_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the fields and sizes of the network that a torch state dict belongs to.

    Args:
        shapes: torch names to shapes.

    Returns:
        Fields of the network, with `channels` and `side` of its data. heads is None
        where neither a bias table (MDT) nor a published size (DiT, SiT) gives it. A row
        for the null label is assumed, for shapes cannot tell it from one more class.
    """
    family = mdt_family(shapes)
    runs = ["blocks"]
    if family == "mdtv2":
        runs = ["en_inblocks", "en_outblocks", "de_blocks"]
    fc1 = f"{runs[0]}.0.mlp.fc1.weight"
    needed = ("pos_embed", _X_EMBEDDER, _LABELS, fc1, _FINAL_LAYER)
    if missing := [name for name in needed if name not in shapes]:
        kind = "an MDT" if family else "a DiT or SiT"
        raise UserError(f"not the weights of {kind}: no {', '.join(missing)}")
    width, channels, patch, _ = shapes[_X_EMBEDDER]
    layers = [
        len({name.split(".")[1] for name in shapes if name.startswith(f"{run}.")})
        for run in runs
    ]
    out = shapes[_FINAL_LAYER][0] // patch**2
    if out not in (channels, 2 * channels):
        raise UserError(f"final layer gives {out} channels for {channels} of the input")
    fields = dict(
        depth=sum(layers),
        width=width,
        heads=_PUBLISHED_HEADS.get((sum(layers), width)),
        patch=patch,
        mlp_ratio=shapes[fc1][0] / width,
        classes=shapes[_LABELS][0] - 1,
        learn_sigma=out == 2 * channels,
        channels=channels,
        side=math.isqrt(shapes["pos_embed"][1]) * patch,
    )
    if family:
        fields["heads"] = shapes[f"{runs[0]}.0.{BIAS_TABLE}"][1]
    if family == "mdtv2":
        fields["decoder"] = layers[2]
    return fields


def _describe(file):
    try:
        return describe_network(file.ema.shapes)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        kind = "an MDT" if mdt_family(file.ema) else "a DiT or SiT"
        raise UserError(f"{file.path}: not the weights of {kind}") from error


def _infer_family(file, args, flag, config):
    named = re.match(r"(SiT|DiT)-", str(args.get("model")))
    sources = {
        "--family": flag,
        "the file's args.model": named and named[1].lower(),
        f"{file.path}, by its tensors' names,": mdt_family(file.ema),
        f"{file.path}, by its config.json,": file.family,
        "--config": config and config.model.make.__name__.lower(),
    }
    family = _agreed_value("family", sources)
    if family is None:
        raise UserError(
            f"{file.path}: shapes do not tell SiT from DiT; "
            "add --family sit or --family dit"
        )
    return family


def _infer_heads(file, network, flag, config):
    path, width, depth = file.path, network["width"], network["depth"]
    usual = None if config or file.heads else network["heads"]
    sources = {
        "--heads": flag,
        f"the config.json beside {path.name}": file.heads,
        f"the published network of depth {depth} and width {width}": usual,
        "--config": config and config.model.heads,
    }
    heads = _agreed_value("heads", sources)
    if config:
        return heads
    possible = [n for n in range(1, width + 1) if width % n == 0]
    if heads not in possible:
        wrong = "shapes do not tell the heads" if heads is None else f"--heads {heads}"
        raise UserError(
            f"{path}: {wrong}; add --heads N with a divisor of width {width}: "
            f"{', '.join(map(str, possible))}"
        )
    return heads


def _agreed_value(what, sources):
    """Returns the one value that sources give, None if none gives one."""
    values = {who: value for who, value in sources.items() if value is not None}
    if len(set(values.values())) > 1:
        pairs = ", but ".join(f"{who} says {value}" for who, value in values.items())
        raise UserError(f"{what}: {pairs}")
    return next(iter(values.values()), None)


def _set_network(config, network, args, is_given):
    rows, model = network["classes"] + 1, config.model
    if is_given:
        model.classes = rows - model.null_label
    else:
        model.classes = args.get("num_classes", rows - 1)
        if model.classes not in (rows, rows - 1):
            raise ValueError(f"num_classes is {model.classes} for {rows} labels")
        model.null_label = model.classes < rows
    for name in ("depth", "width", "heads", "patch", "mlp_ratio", "learn_sigma"):
        model[name] = network[name]
    if "decoder" in network:
        model.decoder = network["decoder"]
    config.shape = (network["side"], network["side"], network["channels"])


def _process(args):
    """Returns the interpolant of these args, with the epsilons that were really used.

    The originals ignored both for velocities on paths without a steep end, and
    sample_eps wherever train_eps was not given too.
    """
    is_ignored = args["path_type"] != "VP" and args["prediction"] == "velocity"
    train, sample = args["train_eps"], args["sample_eps"]
    if is_ignored or train is None:
        train = sample = None
    fields = {ours: table[args[arg]] for arg, (ours, table) in PROCESS.items()}
    return spec(Interpolant, train_eps=train, sample_eps=sample, **fields)


def _set_run(config, args, file):
    for theirs, ours in (SETTINGS | SIT_SETTINGS).items():
        if theirs in args:
            config[ours] = args[theirs]
    if file.ema_rates:
        is_one = len(file.ema_rates) == 1
        with config.ignore_type():
            config.ema_decay = file.ema_rates[0] if is_one else file.ema_rates
    if file.adam is None:
        return
    group = file.adam.group
    make = adan if len(file.adam.moments) > len(ADAM) else optax.adamw
    if config.optimizer.make is not make:
        config.optimizer = spec(make)
    config.optimizer.update(
        learning_rate=float(group["lr"]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        **{f"b{i}": float(b) for i, b in enumerate(group["betas"], start=1)},
    )
    if "max_grad_norm" in group:
        config.clip = float(group["max_grad_norm"]) or None


def _name_of(value, table):
    """Returns a value's name in the table; its own name if the originals lack it."""
    own = getattr(value, "__name__", type(value).__name__)
    return next((name for name, entry in table.items() if entry == value), own)
