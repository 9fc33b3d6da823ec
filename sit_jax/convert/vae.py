"""Stable Diffusion's autoencoder from diffusers' or CompVis' files, by path or name."""

import dataclasses
from pathlib import Path
from typing import Any

from sit_jax.checkpoint import require_same_shapes
from sit_jax.convert import pretrained
from sit_jax.convert.diffusers import STEM, find_weights
from sit_jax.convert.rules import (
    join_names,
    squeeze_attention,
    to_diffusers_names,
    to_flax,
    vae_param_shapes,
    vae_rules,
)
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError
from sit_jax.files import parse_json
from sit_jax.models.codec import Latents, Vae
from sit_jax.models.vae import AutoencoderKL
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import device_put_global
from sit_jax.precision import policy

FIELDS = {  # of a config.json -> ours
    "block_out_channels": "channels",
    "layers_per_block": "layers",
    "latent_channels": "latent",
    "norm_num_groups": "groups",
}
# What a config.json must say if it says it: the rest of what makes an AutoencoderKL.
FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
SCALE = 0.18215  # of a config.json that has none, as ft-mse's and ft-ema's
TRAINING = "loss."  # begins the names of what CompVis' files hold besides
MAX_LAYERS = 2**6  # of a level; a config's word about sizes is a stranger's


def load_vae(
    source: str | Path, precision: str = "exact", device: Any = None, **fields: Any
) -> Vae:
    """Loads a VAE as a codec.

    Args:
      source: diffusers' folder, or a pipeline's that has one named vae; a file, beside
        which config.json is read; a published name or hf:owner/repo/file.
      precision: exact, fast or bf16.
      device: a device or sharding for the weights.
      **fields: others of Vae's, as rounding=to_uint8_mdt.

    Raises:
      UserError: it is no VAE of Stable Diffusion's kind.
    """
    path, config = _find_files(source)
    model, scale = read_vae_config(config) if config else (AutoencoderKL(), SCALE)
    params = _read_params(path, model, config)
    multihost.assert_equal_files(path, *filter(None, [config]))
    rule = policy.get_precision(precision)
    return Vae(
        params=device_put_global(params, device),
        model=policy.with_compute_dtype(rule, model),
        precision=rule,
        **{"scale": scale, **fields},
    )


def with_vae(experiment: Any, vae: Vae) -> Any:
    """Returns the Experiment of a network on latents with a VAE for its images.

    Raises:
      UserError: the VAE has other latents.
    """
    codec, channels = experiment.codec, experiment.shape[-1]
    if not isinstance(codec, Latents):
        raise UserError(
            f"the network works on {type(codec).__name__}, not on latents; "
            "leave out --vae"
        )
    if vae.scale != codec.scale or vae.model.latent != channels:
        raise UserError(
            f"the VAE's latents have {vae.model.latent} channels, scaled by "
            f"{vae.scale}, the network's {channels} and {codec.scale}: "
            "take another VAE"
        )
    codec = vae.replace(rounding=codec.rounding)
    return dataclasses.replace(experiment, codec=codec)


def encoder_warning(vae: str, vae_record: dict, weights: str, meta: dict) -> str | None:
    """Returns a warning if a run's latents are not of this VAE's encoder.

    Args:
      vae: its name, for the warning; vae_record: its record, with the encoder's sha256.
      weights: name of the run's, likewise; meta: of its checkpoint, which says whose
        latents it saw.
    """
    made, here = meta.get("encoder_sha256"), vae_record.get("encoder_sha256")
    if made is None or here is None or made == here:
        return None
    return (
        f"WARNING: {weights} was trained on latents of another encoder than {vae} has "
        f"({made[:12]}, not {here[:12]}): its pictures will not be right"
    )


def read_vae_config(path: Path) -> tuple[AutoencoderKL, float]:
    """Returns the network of a config.json and the factor of its latents.

    Raises:
      UserError: it is another kind of network, or no such config.
    """
    try:
        config = parse_json(path.read_text())
        blocks = config["block_out_channels"]
        fields = {ours: config[name] for name, ours in FIELDS.items() if name in config}
        fields["channels"] = tuple(blocks)
        scale = float(config.get("scaling_factor", SCALE))
        sizes = [*blocks, *(n for name, n in fields.items() if name != "channels")]
        if not all(isinstance(n, int) and 1 <= n < 2**16 for n in sizes):
            raise ValueError("sizes must be whole numbers")
        if fields.get("layers", 1) > MAX_LAYERS:
            raise ValueError(f"more than {MAX_LAYERS} layers in a level")
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no config.json of a VAE ({reason})") from error
    expected = FIXED | {
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
    }
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UserError(
                f"{path} has {name} {config[name]!r}, not {value!r}: there is "
                "code for Stable Diffusion's AutoencoderKL only"
            )
    return AutoencoderKL(**fields), scale


def _find_files(source):
    """Returns the paths of the weights and of their config.json, or None."""
    release, path = pretrained.find(source), pretrained.fetch(source)
    if path.is_dir():
        weights = find_weights(path) or find_weights(path / "vae")
        if weights is None:
            raise UserError(
                f"{path} has no {STEM}.safetensors or {STEM}.bin, nor has a folder vae "
                "in it"
            )
        path = weights
    elif not path.is_file():
        releases = pretrained.PRETRAINED.items()
        names = ", ".join(name for name, r in releases if r.family == "vae")
        raise UserError(f"no VAE at {path}; names are {names}")
    if release is not None and str(source) not in pretrained.PRETRAINED:
        beside = str(source).rpartition("/")[0]
        return path, pretrained.fetch(f"{beside}/config.json")
    config = path.with_name("config.json")
    return path, config if config.is_file() else None


def _read_params(path, model, config):
    tensors = read_torch_file(path).ema
    names = [name for name in tensors if not name.startswith(TRAINING)]
    names = to_diffusers_names(names, len(model.channels))
    state = {name: squeeze_attention(name, tensors[n]) for name, n in names.items()}
    try:
        params, spare = to_flax(vae_rules(model), state)
        if spare:
            raise UserError(f"weights have in addition {join_names(sorted(spare))}")
        require_same_shapes("it", params, vae_param_shapes(model))
    except UserError as error:
        source = config or "sd-vae-ft-mse, for lack of a config.json beside the file"
        raise UserError(f"{path} holds no VAE like {source}: {error}") from error
    return params
