"""The config that a torch file tells of, and what a config is to the originals.

Shapes tell the network but for its family and heads; the args that the originals'
train.py saves beside the weights tell the process and the settings of the run.
"""

import math
import re

import optax

from sit_jax.config import build, difference, spec, to_json
from sit_jax.convert.rules import BIAS_TABLE
from sit_jax.diffusion import paths, predictions
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.loss_weights import (
    likelihood_weight,
    unweighted,
    velocity_weight,
)
from sit_jax.errors import UserError
from sit_jax.models.dit import SIZES
from sit_jax.training.optimizers import adan

FAMILIES = ("sit", "dit")  # not to be told apart by their weights

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
SETTINGS = {  # of the originals' args -> ours
    "global_batch_size": "batch_size",
    "global_seed": "seed",
    "log_every": "log_every",
    "ckpt_every": "save_every",
    "sample_every": "sample_every",
    "cfg_scale": "guidance",
}
NETWORK = ("model", "process", "shape")
X_EMBEDDER = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
FINAL_LAYER = "final_layer.linear.weight"
PUBLISHED_HEADS = {(s["depth"], s["width"]): s["heads"] for s in SIZES.values()}


def config_of(file, base, family=None, heads=None, config=None):
    """-> the training config of a TorchFile; base(family) is what it starts from.

    A given config is kept instead, unless it says otherwise of network or process.
    """
    args, told = file.args or {}, _described(file)
    family = _family(file, args, family, config)
    heads = _heads(file, told, heads, config)
    given = config is not None
    config = config if given else base(family)
    before = to_json({name: config[name] for name in NETWORK})
    try:
        _fill_network(config, {**told, "heads": heads}, args, given)
        if family == "sit" and "path_type" in args:
            config.process = _process(args)
        if not given:
            _fill_run(config, args, file)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file.path}: args not understood ({error!r})") from error
    after = to_json({name: config[name] for name in NETWORK})
    if given and (unlike := difference(before, after)):
        listed = "; ".join(f"{n} is {a}, the weights say {b}" for n, a, b in unlike)
        raise UserError(f"the config does not fit {file.path}: {listed}")
    return config


def args_of(config):
    """-> what the originals' train.py would have been told, for a file of its kind."""
    model, family = config.model, config.model.make.__name__
    sizes = (n for n, size in SIZES.items() if all(model[k] == size[k] for k in size))
    args = {
        "data_path": "",
        "results_dir": "results",
        "model": f"{family}-{next(sizes, 'custom')}/{model.patch}",
        "image_size": 8 * config.shape[0],
        "num_classes": model.classes,
        "epochs": 1400,
        "global_batch_size": config.batch_size,
        "global_seed": config.seed,
        "vae": "ema",
        "num_workers": 4,
        "log_every": config.log_every,
        "ckpt_every": config.save_every,
    }
    process = build(config.process)
    if family != "SiT" or not isinstance(process, Interpolant):
        return args
    return args | {
        "sample_every": config.sample_every,
        "cfg_scale": float(getattr(config.guidance, "scale", config.guidance)),
        "wandb": False,
        "ckpt": None,
        "path_type": _name_of(process.path, PATHS),
        "prediction": _name_of(process.predicts, PREDICTIONS),
        "loss_weight": _name_of(process.weight, WEIGHTS),
        "sample_eps": process.sample_margin,
        "train_eps": process.train_margin,
    }


def group_of(config, step):
    """-> the hyperparameters that torch's AdamW or Adan would have at this step."""
    ours = config.optimizer
    plain = ours.make in (optax.adam, optax.adamw) and not ours.nesterov
    if not plain and ours.make is not adan:
        raise UserError(f"config.optimizer is {ours.make.__name__}, not plain AdamW")
    rate = build(ours.learning_rate)
    group = {
        "lr": float(rate(step) if callable(rate) else rate),
        "betas": (ours.b1, ours.b2) if plain else (ours.b1, ours.b2, ours.b3),
        "eps": ours.eps,
        "weight_decay": ours.get("weight_decay", 0.0),
    }
    if plain:
        return group
    clip = {"max_grad_norm": config.clip or 0.0, "no_prox": False}
    return group | clip | {"foreach": True, "fused": True}


def mdt_family(names):
    """Returns mdt or mdtv2 by the names in a torch state dict, None for others."""
    if any(name.startswith("en_inblocks.") for name in names):
        return "mdtv2"
    return "mdt" if f"blocks.0.{BIAS_TABLE}" in names else None


def describe_network(shapes):
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
    needed = ("pos_embed", X_EMBEDDER, LABELS, fc1, FINAL_LAYER)
    if missing := [name for name in needed if name not in shapes]:
        kind = "an MDT" if family else "a DiT or SiT"
        raise UserError(f"not the weights of {kind}: no {', '.join(missing)}")
    width, channels, patch, _ = shapes[X_EMBEDDER]
    layers = [
        len({name.split(".")[1] for name in shapes if name.startswith(f"{run}.")})
        for run in runs
    ]
    out = shapes[FINAL_LAYER][0] // patch**2
    if out not in (channels, 2 * channels):
        raise UserError(f"final layer gives {out} channels for {channels} of the input")
    fields = dict(
        depth=sum(layers),
        width=width,
        heads=PUBLISHED_HEADS.get((sum(layers), width)),
        patch=patch,
        mlp_ratio=shapes[fc1][0] / width,
        classes=shapes[LABELS][0] - 1,
        learn_sigma=out == 2 * channels,
        channels=channels,
        side=math.isqrt(shapes["pos_embed"][1]) * patch,
    )
    if family:
        fields["heads"] = shapes[f"{runs[0]}.0.{BIAS_TABLE}"][1]
    if family == "mdtv2":
        fields["decoder"] = layers[2]
    return fields


def _described(file):
    try:
        return describe_network(file.ema.shapes)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        kind = "an MDT" if mdt_family(file.ema) else "a DiT or SiT"
        raise UserError(f"{file.path}: not the weights of {kind}") from error


def _family(file, args, flag, config):
    named = re.match(r"(SiT|DiT)-", str(args.get("model")))
    says = {
        "--family": flag,
        "the file's args.model": named and named[1].lower(),
        f"{file.path}, by its tensors' names,": mdt_family(file.ema),
        f"{file.path}, by its config.json,": file.family,
        "--config": config and config.model.make.__name__.lower(),
    }
    family = _agreed("family", says)
    if family is None:
        raise UserError(
            f"{file.path}: shapes do not tell SiT from DiT; "
            "add --family sit or --family dit"
        )
    return family


def _heads(file, told, flag, config):
    path, width, depth = file.path, told["width"], told["depth"]
    published = None if config or file.heads else told["heads"]
    says = {
        "--heads": flag,
        f"the config.json beside {path.name}": file.heads,
        f"the published network of depth {depth} and width {width}": published,
        "--config": config and config.model.heads,
    }
    heads = _agreed("heads", says)
    if config:
        return heads
    possible = [n for n in range(1, width + 1) if width % n == 0]
    if heads is None or heads not in possible:
        listed = ", ".join(map(str, possible))
        wrong = "shapes do not tell the heads" if heads is None else f"--heads {heads}"
        raise UserError(
            f"{path}: {wrong}; add --heads N with a divisor of width {width}: {listed}"
        )
    return heads


def _agreed(what, says):
    """The one value among those given by several sources, or None."""
    says = {who: value for who, value in says.items() if value is not None}
    if len(set(says.values())) > 1:
        listed = ", but ".join(f"{who} says {value}" for who, value in says.items())
        raise UserError(f"{what}: {listed}")
    return next(iter(says.values()), None)


def _fill_network(config, told, args, given):
    rows, model = told["classes"] + 1, config.model
    if given:
        model.classes = rows - model.null_label
    else:
        model.classes = args.get("num_classes", rows - 1)
        if model.classes not in (rows, rows - 1):
            raise ValueError(f"num_classes is {model.classes} for {rows} labels")
        model.null_label = model.classes < rows
    for name in ("depth", "width", "heads", "patch", "mlp_ratio", "learn_sigma"):
        model[name] = told[name]
    if "decoder" in told:
        model.decoder = told["decoder"]
    config.shape = (told["side"], told["side"], told["channels"])


def _process(args):
    """The interpolant of these args, with the margins that the originals really used.

    They ignored both for velocities on paths without a steep end, and sample_eps
    wherever train_eps was not given too.
    """
    ignored = args["path_type"] != "VP" and args["prediction"] == "velocity"
    train, sample = args["train_eps"], args["sample_eps"]
    if ignored or train is None:
        train = sample = None
    return spec(
        Interpolant,
        path=PATHS[args["path_type"]],
        predicts=PREDICTIONS[args["prediction"]],
        weight=WEIGHTS[args["loss_weight"]],
        train_margin=train,
        sample_margin=sample,
    )


def _fill_run(config, args, file):
    for theirs, ours in SETTINGS.items():
        if theirs in args:
            config[ours] = args[theirs]
    if file.rates:
        several = len(file.rates) > 1
        with config.ignore_type():
            config.ema_decay = file.rates if several else file.rates[0]
    if file.adam is None:
        return
    group = file.adam.group
    betas = {f"b{i}": float(b) for i, b in enumerate(group["betas"], start=1)}
    make = adan if file.adam.more else optax.adamw
    if config.optimizer.make is not make:
        config.optimizer = spec(make)
    config.optimizer.update(
        learning_rate=float(group["lr"]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        **betas,
    )
    if "max_grad_norm" in group:
        config.clip = float(group["max_grad_norm"]) or None


def _name_of(part, table):
    """part's name in the table; of one that the originals lack, its own."""
    own = getattr(part, "__name__", type(part).__name__)
    return next((name for name, known in table.items() if known == part), own)
