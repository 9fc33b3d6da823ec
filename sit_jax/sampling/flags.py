"""Reads the flags that say how to sample: each sets a field of the config."""

from argparse import ArgumentParser, Namespace
from typing import Any

from ml_collections import ConfigDict

from sit_jax import config as configs
from sit_jax.diffusion.guidance import GuidanceInterval
from sit_jax.errors import UserError
from sit_jax.precision.policy import PRECISIONS
from sit_jax.ranges import COUNT, FINITE, Above, AtLeast, Between
from sit_jax.samplers.registry import (
    CONTROLS,
    DIFFUSION_FORMS,
    LAST_STEPS,
    SAMPLER_FLAGS,
    SAMPLERS,
    configure_sampler,
)
from sit_jax.sampling.presets import Preset

NETWORK = ("model", "process", "shape")
_SCALE = "1: none; of MDT's schedule its largest, --guidance-interval 0,1 without it"
# how it is computed, and not what
COMPUTING = ("model.remat", "model.unroll", "model.attention", "model.dtype")


def add_flags(parser: ArgumentParser) -> None:
    """Adds the flags of sampler, guidance and precision."""
    add = parser.add_argument_group("sampler and guidance").add_argument
    add("--sampler", metavar="NAME", help=", ".join(SAMPLERS))
    add("--steps", type=COUNT, metavar="N", help="steps taken")
    add("--num-sampling-steps", type=COUNT, metavar="N", help="as originals count")
    add("--respacing", metavar="N|A,B,..|ddimN", help="steps of a diffusion to keep")
    add("--eta", type=Between(0.0, 1.0), help="of ddim: fresh noise, 1 as ddpm")
    add("--atol", type=Above(0.0), metavar="TOLERANCE")
    add("--rtol", type=Above(0.0), metavar="TOLERANCE")
    add("--step-control", metavar="WORD", help=", ".join(CONTROLS))
    add("--reverse", action="store_true", help="from images (--noise) to noise")
    add("--diffusion-form", metavar="NAME", help=", ".join(DIFFUSION_FORMS))
    add("--diffusion-norm", type=AtLeast(0.0), metavar="FACTOR")
    add("--last-step", metavar="NAME", help=", ".join(LAST_STEPS))
    add("--last-step-size", type=Between(0.0, 1.0), metavar="TIME")
    add("--trajectory", type=COUNT, metavar="N", help="states on the way, as a strip")
    add("--guidance", "--cfg-scale", type=FINITE, metavar="SCALE", help=_SCALE)
    add("--guidance-interval", metavar="LO,HI", help="0 noise, 1 data; none outside")
    add("--guidance-channels", metavar="3|all", help="those that are extrapolated")
    add("--precision", metavar="WORD", help=", ".join(PRECISIONS))


def apply(
    config: ConfigDict,
    args: Namespace,
    overrides: list[str],
    source: Any,
    preset: Preset | None = None,
) -> ConfigDict:
    """Changes the weights' config by a preset, a file, the flags and --config.x=y.

    Args:
        config: of the weights; is changed.
        args: of add_flags, with config.
        overrides: --config.x=y.
        source: where the weights are, for messages.
        preset: a published run's sampler and guidance.

    Returns:
        The config.
    """
    if "precision" not in config:
        # a run from before there was a choice
        config.precision = ConfigDict(dict(training="fast", model="exact", vae="exact"))
    if args.config is not None:
        _take_sampling(config, configs.load(args.config), source)
    if preset:
        with config.ignore_type():
            config.sampler, config.guidance = preset.sampler, preset.guidance
            config.guidance_channels = 3
    flags = {flag: vars(args)[flag[2:].replace("-", "_")] for flag in SAMPLER_FLAGS}
    configure_sampler(config, args.sampler, flags, counted=args.num_sampling_steps)
    _set_guidance(config, args)
    if args.precision is not None:
        config.precision.model = args.precision
    configs.override(config, overrides)
    return config


def _take_sampling(config, other, source):
    """Takes sampler and guidance of another config, once its network is the same."""
    pick = lambda c: configs.to_json({name: c[name] for name in NETWORK})
    unlike = configs.difference(pick(config), pick(other))
    unlike = [row for row in unlike if row[0] not in COMPUTING]
    if unlike:
        listed = "; ".join(f"{n} is {a}, not {b}" for n, a, b in unlike)
        raise UserError(f"{source} holds another network: {listed}")
    with config.ignore_type():
        for name in ("sampler", "guidance", "guidance_channels", "codec", "source"):
            config[name] = other[name]


def _set_guidance(config, args):
    scale, channels = args.guidance, args.guidance_channels
    low_high = args.guidance_interval
    with config.ignore_type():
        if scale is not None:
            # the scale of a schedule that the weights come with, as MDT's do
            is_schedule = isinstance(config.guidance, ConfigDict)
            is_schedule = is_schedule and "scale" in config.guidance
            if is_schedule and scale != 1 and low_high is None:
                config.guidance.scale = scale
            else:
                config.guidance = scale
        if low_high is not None:
            try:
                low, high = map(float, low_high.split(","))
            except ValueError as error:
                raise UserError(
                    f"--guidance-interval {low_high!r}: two numbers LO,HI, such as "
                    "0.2,0.8"
                ) from error
            scale = config.guidance
            interval = configs.spec(GuidanceInterval, scale=scale, low=low, high=high)
            config.guidance = interval
    if channels not in (None, "3", "all"):
        raise UserError(f"--guidance-channels {channels!r}: 3 or all")
    if channels is not None:
        config.guidance_channels = config.shape[-1] if channels == "all" else 3
