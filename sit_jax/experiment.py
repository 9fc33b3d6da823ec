"""What a config describes, built; and the one place that checks it as a whole."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from sit_jax.config import build, difference, from_json, leaves, to_json
from sit_jax.data.latent_cache import check_cache
from sit_jax.data.loader import read_records
from sit_jax.errors import UserError
from sit_jax.files import as_path
from sit_jax.models.codec import codec_sample
from sit_jax.parallel.mesh import num_batch_shards
from sit_jax.precision.policy import get_precision
from sit_jax.ranges import FINITE, SEED, Above, AtLeast, Between
from sit_jax.training.state import ema_rates
from sit_jax.typing import Codec, Process, Sampler, TimestepSampler

SAMPLING = ("model", "process", "sampler", "codec", "guidance", "adapter")
TRAINING = (*SAMPLING, "optimizer", "timesteps")
MOST_NUMBERS = 2**24  # in an image: a stranger's config shall not fill the memory


class Field(NamedTuple):
    """A field of a config: what it means, its range, and whether a begun run minds.

    may_change: a run may be continued with another value, as no training step computes
    anything else; "set" if only where there was None.
    """

    meaning: str
    range: Between | None = None
    may_change: bool | str = False


COUNT = AtLeast(1)
FIELDS = {
    "shape": Field("(height, width, channels) of what the network works on"),
    "model": Field("the network: SiT, DiT, MDT or MDTv2"),
    "model.remat": Field("what is computed twice to save memory", None, True),
    "model.unroll": Field("layers compiled in a row", None, True),
    "model.mask_buckets": Field(
        "programs for numbers of visible tokens (MDT)", None, True
    ),
    "model.attention": Field("the program that computes attention", None, True),
    "process": Field("Interpolant or GaussianDiffusion: times, noise and loss"),
    "timesteps": Field("how times are drawn; None: as the process does"),
    "codec": Field("between images and what the network works on"),
    "vae": Field("VAE by name or path, to encode images and draw sheets", None, "set"),
    "source": Field("the data"),
    "source.path": Field("where the data is", None, True),
    "source.max_corrupt_fraction": Field("of images that may be damaged", None, True),
    "count_classes": Field("whether model.classes becomes the number in the data"),
    "synthetic": Field("whether random latents take the place of the data"),
    "optimizer": Field("an optax optimizer, with its learning rate or schedule"),
    "clip": Field("largest global norm of the gradient; None: any", Above(0.0)),
    "adapter": Field("LoRA: trains adapters over --init; None: the whole network"),
    "workers": Field("processes that decode images; 0: threads", AtLeast(0), True),
    "batch_size": Field("images a step, over all devices", COUNT, True),
    "accumulate": Field("parts that a batch is gone through in", COUNT, True),
    "ema_decay": Field("rate of the moving average of weights, or several rates"),
    "label_drop": Field("share of labels replaced by none", Between(0.0, 1.0)),
    "seed": Field("of weights, times, noise and the order of the data", SEED),
    "steps": Field("training steps", COUNT, True),
    "max_skipped": Field("steps in a row that may be not finite", COUNT, True),
    "check_replicas": Field("steps between comparisons of copies", AtLeast(0), True),
    "log_every": Field("steps between lines of the log", COUNT, True),
    "log_quartiles": Field("whether losses are logged by quarters of time", None, True),
    "save_every": Field("steps between checkpoints", COUNT, True),
    "keep_last": Field("newest checkpoints kept; None: all", COUNT, True),
    "keep_every": Field("steps between checkpoints kept for good", COUNT, True),
    "sample_every": Field("steps between sheets of samples; 0: none", AtLeast(0), True),
    "preview": Field("images on such a sheet; 0: none", AtLeast(0), True),
    "evaluate_every": Field("steps between FIDs of a run; 0: none", AtLeast(0), True),
    "evaluate_images": Field("samples that such a FID is of", AtLeast(2), True),
    "reference": Field("what they are compared with: a file or a source", None, True),
    "features": Field("of which network; None: Inception", None, True),
    "sampler": Field("how samples are drawn", None, True),
    "guidance": Field("scale of classifier-free guidance", FINITE, True),
    "guidance_channels": Field("channels that are guided", COUNT, True),
    "precision": Field("exact, fast or bf16"),
    "precision.training": Field("exact, fast or bf16: of training steps"),
    "precision.model": Field("exact, fast or bf16: of sampling", None, True),
    "precision.vae": Field("exact, fast or bf16: of the VAE", None, True),
    "mesh": Field("devices along data, fsdp and tensor", None, True),
}
OPTIMIZER_RANGES = {  # optax's names, of optimizers and schedules
    **dict.fromkeys(("learning_rate", "weight_decay"), Between(0.0, 100.0)),
    **dict.fromkeys(("b1", "b2", "b3", "eps", "eps_root"), Between(0.0, 1.0)),
    **dict.fromkeys(("init_value", "peak_value", "end_value"), Between(0.0, 100.0)),
    **dict.fromkeys(("warmup_steps", "transition_begin"), AtLeast(0)),
    **dict.fromkeys(("transition_steps", "decay_steps"), COUNT),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The built parts of a config; None where a role was not asked for.

    shape: (height, width, channels) of the data. guidance: a number, or a function of
    time. ema_decay: a rate or a tuple of rates. timesteps: None where the process
    draws its times. adapter: None where the network itself is trained.
    """

    shape: tuple[int, int, int]
    guidance_channels: int
    ema_decay: float | tuple[float, ...] = 0.9999
    model: Any = None
    process: Process | None = None
    sampler: Sampler | None = None
    codec: Codec | None = None
    guidance: Any = None
    optimizer: optax.GradientTransformation | None = None
    timesteps: TimestepSampler | None = None
    adapter: Any = None

    @property
    def timestep_sampler_state(self):
        """Returns what the choice of times remembers at the start."""
        return () if self.timesteps is None else self.timesteps.init(self.process)


def read_config(stored):
    """Returns the config that stands beside weights, once it describes a network.

    Args:
      stored: JSON of a whole config, a stranger's perhaps.

    Raises:
      UserError: a field that every config has is missing, or the model is refused.
    """
    config = from_json(stored if isinstance(stored, dict) else {})
    needed = (*SAMPLING[:-1], "shape", "guidance_channels", "ema_decay")
    if missing := [name for name in needed if name not in config]:
        raise UserError(f"a stored config has no {', '.join(missing)}")
    build(config.model)
    return config


def build_experiment(config, roles=SAMPLING):
    """Returns the Experiment of a config, of which only some roles are built.

    Args:
      config: a ConfigDict, of a file or of from_json.
      roles: fields to build; what opens weights or draws samples asks for no optimizer.

    Raises:
      UserError: a part cannot be built, or parts do not fit each other.
    """
    _check_fields(config)
    built = {role: build(config.get(role)) for role in roles}
    if "optimizer" in roles and config.clip is not None:
        clip = optax.clip_by_global_norm(config.clip)
        built["optimizer"] = optax.chain(clip, built["optimizer"])
    experiment = Experiment(
        shape=_shape(config),
        guidance_channels=config.guidance_channels,
        ema_decay=config.ema_decay,
        **built,
    )
    ema_rates(experiment.ema_decay)  # refuses what is no rate
    _ = experiment.timestep_sampler_state  # refuses a process without steps
    return experiment


def validate(config, experiment, source, mesh):
    """Refuses a config that cannot be trained with this data on these devices.

    Args:
      config: the ConfigDict.
      experiment: built from it, with the roles of TRAINING.
      source: the data; one record of it is read.
      mesh: the devices.

    Raises:
      UserError: with the field, its value and what it takes.
    """
    for name in config.precision.values():
        get_precision(name)
    if config.label_drop and not config.model.null_label:
        raise UserError("label_drop needs model.null_label=True; or set label_drop=0")
    if source.classes != config.model.classes:
        raise UserError(
            f"the data has {source.classes} classes, the model {config.model.classes}; "
            f"set --config.model.classes={source.classes}"
        )
    check_batch(config, num_batch_shards(mesh))
    check_reference(config)
    check_cache(source, experiment.codec, experiment.shape)
    check_data(experiment, source)
    check_reload(config)


def check_batch(config, num_shards):
    """Refuses a batch that does not split over the devices.

    Args:
      config: its batch_size and accumulate are read.
      num_shards: parts that the mesh splits a batch into.
    """
    parts = num_shards * max(config.accumulate, 1)
    if config.batch_size < 1 or config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {parts} "
            f"({num_shards} parts of the mesh x accumulate {config.accumulate}); "
            f"the nearest that is: {max(config.batch_size // parts, 1) * parts}"
        )


def check_data(experiment, source):
    """Refuses data of another shape than the network's; reads one record."""
    batch, _ = read_records(source, [0], [False])  # the next one if it is corrupt
    data = jax.eval_shape(codec_sample, experiment.codec, jax.random.key(0), batch)
    if data.shape[1:] != experiment.shape:
        raise UserError(
            f"the data is {data.shape[1:]}, but config.shape is {experiment.shape}; "
            f"set --config.shape='{data.shape[1:]}', or take other data"
        )


def check_reload(config):
    """Refuses a config from whose stored form samples could not be drawn."""
    stored = json.loads(json.dumps(to_json(config)))
    try:
        build_experiment(from_json(stored), SAMPLING)
    except UserError as error:
        raise UserError(f"what this run stores could not be sampled: {error}") from None


def describe(config):
    """Returns lines for a person: each field, its value, and what it means or where."""
    lines = []
    fields = {name.removesuffix(".make"): v for name, v in leaves(to_json(config))}
    for name, value in sorted(fields.items()):
        text = value["name"] if isinstance(value, dict) else value
        lines.append(f"{name} = {text}".ljust(58) + f"  # {_meaning(config, name)}")
    return lines


def _meaning(config, name):
    """Returns what a field means, or where its constructor is."""
    parent = name.rpartition(".")[0]
    make = _value(config, f"{parent}.make")
    if name in FIELDS or not parent:
        return FIELDS[name].meaning
    if make:
        return f"{make.__module__.replace('.', '/')}.py: {make.__name__}"
    return _meaning(config, parent)


def fixed_differences(before, now):
    """Returns [(dotted name, old, new)] of what a run may not be continued with.

    Args:
      before: JSON of the config that the run began with.
      now: JSON of the config that it shall go on with.
    """
    before, fixed = to_json(from_json(before)), []  # names of before are today's now
    for name, old, new in difference(before, now):
        parts = name.split(".")
        names = [".".join(parts[: i + 1]) for i in range(len(parts))]
        may = [FIELDS[each].may_change for each in names if each in FIELDS]
        is_new = old in ("(absent)", "null")
        idle = old == "(absent)" and new in ("null", "false")
        if not (True in may or "set" in may and is_new or idle):
            fixed.append((name, old, new))
    return fixed


def _shape(config):
    """Returns config.shape, before anything of its size is made."""
    shape = tuple(config.shape)
    is_whole = all(isinstance(side, int) and side in COUNT for side in shape)
    if len(shape) != 3 or not is_whole:
        raise UserError(f"shape {shape} is not (height, width, channels)")
    if np.prod(shape, dtype=float) > MOST_NUMBERS:
        raise UserError(f"shape {shape} is too large for one image")
    return shape


def _check_fields(config):
    """Refuses numbers outside the ranges of FIELDS."""
    ranges = {name: field.range for name, field in FIELDS.items()}
    for part in ("optimizer", "optimizer.learning_rate"):
        ranges |= {f"{part}.{name}": r for name, r in OPTIMIZER_RANGES.items()}
    for name, bounds in ranges.items():
        value = _value(config, name)
        if bounds and isinstance(value, int | float) and value not in bounds:
            raise UserError(f"{name} is {value}; it takes {bounds}")


def check_reference(config):
    """Refuses what a curve of FIDs cannot be compared with."""
    if not config.get("evaluate_every", 0):
        return
    if isinstance(config.features, str):
        raise UserError("features is a constructor: only a config file can set it")
    if config.reference is None:
        raise UserError(
            "evaluate_every needs a reference: --config.reference=FILE, made by "
            "evaluate.py --stats or ADM's"
        )
    if isinstance(config.reference, str) and not as_path(config.reference).is_file():
        raise UserError(f"reference: no file at {config.reference}")
    build(config.reference)  # a source refuses here what it cannot give


def _value(node, name):
    """Returns a field's value by its dotted name; None where there is none (yet)."""
    for part in name.split("."):
        try:
            node = node.get(part) if isinstance(node, ConfigDict) else None
        except RequiredValueError:  # build() says which field needs a value
            return None
    return node.item() if isinstance(node, np.number) else node
