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
    add(
        "--num-sampling-steps",
        type=COUNT,
        metavar="N",
        help="as the originals count",
    )
    add("--respacing", metavar="N|A,B,..|ddimN", help="steps of a diffusion to keep")
    add(
        "--eta",
        type=Between(0.0, 1.0),
        help="of ddim: fresh noise, 1 as ddpm",
    )
    add("--atol", type=Above(0.0), metavar="TOLERANCE")
    add("--rtol", type=Above(0.0), metavar="TOLERANCE")
    add("--step-control", metavar="WORD", help=", ".join(CONTROLS))
    add("--reverse", action="store_true", help="from images (--noise) to noise")
    add("--diffusion-form", metavar="NAME", help=", ".join(DIFFUSION_FORMS))
    add("--diffusion-norm", type=AtLeast(0.0), metavar="FACTOR")
    add("--last-step", metavar="NAME", help=", ".join(LAST_STEPS))
    add("--last-step-size", type=Between(0.0, 1.0), metavar="TIME")
    add(
        "--trajectory",
        type=COUNT,
        metavar="N",
        help="N states on the way, as a strip",
    )
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
        words = {"training": "fast", "model": "exact", "vae": "exact"}
        config.precision = ConfigDict(words)
    if args.config is not None:
        _take(config, configs.load(args.config), source)
    if preset:
        with config.ignore_type():
            config.sampler, config.guidance = preset.sampler, preset.guidance
            config.guidance_channels = 3
    flags = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in SAMPLER_FLAGS}
    configure_sampler(config, args.sampler, flags, counted=args.num_sampling_steps)
    _guide(config, args)
    if args.precision is not None:
        config.precision.model = args.precision
    configs.override(config, overrides)
    return config


def _take(config, given, source):
    """Sampler and guidance of another config, once its network is the same."""
    pick = lambda c: configs.to_json({name: c[name] for name in NETWORK})
    unlike = configs.difference(pick(config), pick(given))
    unlike = [row for row in unlike if row[0] not in COMPUTING]
    if unlike:
        listed = "; ".join(f"{n} is {a}, not {b}" for n, a, b in unlike)
        raise UserError(f"{source} holds another network: {listed}")
    with config.ignore_type():
        for name in ("sampler", "guidance", "guidance_channels", "codec", "source"):
            config[name] = given[name]


def _guide(config, args):
    with config.ignore_type():
        if args.guidance is not None:
            _strength(config, args)
        if args.guidance_interval is not None:
            low, high = _ends(args.guidance_interval)
            scale = config.guidance
            if not 0 <= low < high <= 1:
                raise UserError(
                    f"--guidance-interval {args.guidance_interval}: LO < HI in [0, 1]; "
                    "0 is noise, 1 is data"
                )
            config.guidance = configs.spec(
                GuidanceInterval, scale=scale, low=low, high=high
            )
    word = args.guidance_channels
    if word is None:
        return
    if word not in ("3", "all"):
        raise UserError(f"--guidance-channels {word!r}: 3 or all")
    config.guidance_channels = config.shape[-1] if word == "all" else 3


def _strength(config, args):
    """A number is the scale of a schedule that the weights come with, as MDT's do."""
    shaped = hasattr(config.guidance, "make") and "scale" in config.guidance
    if shaped and args.guidance != 1 and args.guidance_interval is None:
        config.guidance.scale = args.guidance
    else:
        config.guidance = args.guidance


def _ends(text):
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise UserError(
            f"--guidance-interval {text!r}: two numbers LO,HI, such as 0.2,0.8"
        ) from error
    return low, high
