"""What a config describes, built, and checked part against part."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax

from sit_jax.config import build
from sit_jax.errors import UserError
from sit_jax.models.codec import data_of
from sit_jax.precision.policy import PRECISIONS
from sit_jax.training.state import check_ema_decay


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The built parts that training and sampling share; see configs/sit_xl2.py."""

    model: Any
    process: Any
    sampler: Any
    codec: Any
    tx: optax.GradientTransformation
    shape: tuple[int, int, int]
    guidance: Any
    guidance_channels: int
    ema_decay: float | tuple = 0.9999
    timesteps: Any = None  # see timesteps.py; None: the process draws its times
    adapter: Any = None  # adapters.lora.LoRA; None: the network itself is trained

    @property
    def losses(self):
        """What the choice of times remembers at the start."""
        return () if self.timesteps is None else self.timesteps.begin(self.process)


def recipe(config):
    """-> Recipe of a config; parts that do not fit each other are refused."""
    tx = build(config.optimizer)
    if config.clip is not None:
        if not config.clip > 0:
            raise UserError(f"clip is {config.clip}; it must be positive, or None")
        tx = optax.chain(optax.clip_by_global_norm(config.clip), tx)
    parts = Recipe(
        model=build(config.model),
        process=build(config.process),
        sampler=build(config.sampler),
        codec=build(config.codec),
        tx=tx,
        shape=tuple(config.shape),
        guidance=build(config.guidance),
        guidance_channels=config.guidance_channels,
        ema_decay=config.ema_decay,
        timesteps=build(config.get("timesteps")),
        adapter=build(config.get("adapter")),
    )
    _check(parts)
    return parts


POSITIVE = (
    *("batch_size", "steps", "accumulate", "log_every", "save_every"),
    *("max_skipped", "guidance_channels"),
)


def check_training(config, source):
    """Refuses numbers that training cannot honour."""
    for name in POSITIVE:
        if config[name] < 1:
            raise UserError(f"{name} is {config[name]}; it must be at least 1")
    for name in ("keep_last", "keep_every"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"{name} is {config[name]}; at least 1, or None for all")
    if not 0 <= config.label_drop <= 1:
        raise UserError(f"label_drop is {config.label_drop}; it must be in [0, 1]")
    for name in ("sample_every", "preview", "check_replicas", "workers"):
        if (value := config.get(name, 0)) < 0:
            raise UserError(f"{name} is {value}; 0 is none, else at least 1")
    for part, word in config.get("precision", {}).items():
        if word not in PRECISIONS:
            words = ", ".join(PRECISIONS)
            raise UserError(f"precision.{part} is {word!r}; there are {words}")
    check_seed("seed", config.seed)
    if isinstance(config.optimizer.get("mask"), str):
        raise UserError("optimizer.mask is a function: only a config file can set it")
    if config.label_drop and not config.model.null_label:
        raise UserError("label_drop needs model.null_label=True; or set label_drop=0")
    if source.classes != config.model.classes:
        raise UserError(
            f"the data has {source.classes} classes, the model {config.model.classes}; "
            f"set --config.model.classes={source.classes}"
        )


def check_batch(config, rows):
    """Refuses a batch that cannot be split into so many rows of devices."""
    parts = rows * max(config.accumulate, 1)
    if config.batch_size < 1 or config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {parts} "
            f"({rows} parts of the mesh x accumulate {config.accumulate}); "
            f"the nearest that is: {max(config.batch_size // parts, 1) * parts}"
        )


def check_seed(name, seed):
    if not 0 <= seed < 2**32:
        raise UserError(f"{name} is {seed}; it must be in 0..{2**32 - 1}")


def check_data(parts, source):
    """Refuses data that the network is not made for."""
    batch = {name: np.asarray(value)[None] for name, value in source[0].items()}
    data = jax.eval_shape(data_of, parts.codec, jax.random.key(0), batch)
    found = data.shape[1:]
    if found != parts.shape:
        raise UserError(
            f"the data is {found}, but config.shape is {parts.shape}; "
            f"set --config.shape='{found}', or take other data"
        )


def _check(parts):
    check_ema_decay(parts.ema_decay)
    _ = parts.losses  # refuses a process without steps to choose among
    if len(parts.shape) != 3 or min(parts.shape) < 1:
        raise UserError(f"shape {parts.shape} is not (height, width, channels)")
    scale = getattr(parts.codec, "scale", 1.0)
    if isinstance(scale, float | int) and not (scale > 0 and math.isfinite(scale)):
        raise UserError(f"codec.scale is {scale}; it must be positive and finite")
    if isinstance(parts.guidance, float | int) and not math.isfinite(parts.guidance):
        raise UserError(f"guidance is {parts.guidance}; it must be a finite number")
