"""Stable Diffusion's autoencoder from diffusers' or CompVis' files, by path or name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sit_jax.convert import pretrained
from sit_jax.convert.rules import (
    join_names,
    require_match,
    squeeze_attention,
    to_diffusers_names,
    to_flax,
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

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FIELDS = {  # of a config.json -> ours
    "block_out_channels": "channels",
    "layers_per_block": "layers",
    "latent_channels": "latent",
    "norm_num_groups": "groups",
}
# What a config.json must say if it says it: the rest of what makes an AutoencoderKL.
ALWAYS = {
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


def load_vae(source, word="exact", place=None, **fields):
    """-> codec.Vae of a folder, a file, a name of pretrained.py or hf:owner/repo/file.

    word: see precision.py. place: a device or sharding for the weights. fields: others
    of Vae's, as rounding=to_uint8_mdt. A folder is diffusers', or
    a pipeline's that has one named vae. config.json is read where it is beside.
    """
    path, config = _files(source)
    model, scale = described(config) if config else (AutoencoderKL(), SCALE)
    params = _params(path, model, config)
    multihost.assert_equal_files(path, *filter(None, [config]))
    chosen = policy.get_precision(word)
    return Vae(
        params=device_put_global(params, place),
        model=policy.with_compute_dtype(chosen, model),
        precision=chosen,
        **{"scale": scale, **fields},
    )


def with_vae(parts, vae):
    """A Recipe of a network on latents -> the same with a Vae to make images of them.

    It rounds as the recipe's codec says. Refuses a VAE of other latents.
    """
    codec = parts.codec
    if not isinstance(codec, Latents):
        raise UserError(
            f"the network works on {type(codec).__name__}, not on latents; "
            "leave out --vae"
        )
    if vae.scale != codec.scale or vae.model.latent != parts.shape[-1]:
        raise UserError(
            f"the VAE's latents have {vae.model.latent} channels, scaled by "
            f"{vae.scale}, the network's {parts.shape[-1]} and {codec.scale}: "
            "take another VAE"
        )
    return dataclasses.replace(parts, codec=vae.replace(rounding=codec.rounding))


def strange(vae, record, weights, meta):
    """A sentence if a run's latents are not of this VAE's encoder, else None.

    record: the VAE's; meta: of the run's checkpoint, which says whose latents it saw.
    """
    made, here = meta.get("encoder_sha256"), record.get("encoder_sha256")
    if None in (made, here) or made == here:
        return None
    return (
        f"WARNING: {weights} was trained on latents of another encoder than {vae} has "
        f"({made[:12]}, not {here[:12]}): its pictures will not be right"
    )


def described(path):
    """config.json -> AutoencoderKL and the scale; refuses that of anything else."""
    given = _read(path)
    blocks = given["block_out_channels"]
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
    }
    wanted = ALWAYS | kinds
    odd = [k for k in wanted if given.get(k, wanted[k]) != wanted[k]]
    if odd:
        raise UserError(
            f"{path} has {odd[0]} {given[odd[0]]!r}, not {wanted[odd[0]]!r}: there is "
            "code for Stable Diffusion's AutoencoderKL only"
        )
    fields = {ours: given[name] for name, ours in FIELDS.items() if name in given}
    model = AutoencoderKL(**fields | {"channels": tuple(blocks)})
    return model, float(given.get("scaling_factor", SCALE))


def _read(path):
    """-> the dict of a config.json whose numbers are numbers."""
    try:
        given = parse_json(path.read_text())
        sizes = [given[name] for name in FIELDS if name in given]
        numbers = [*given["block_out_channels"], *sizes[1:]]
        if all(isinstance(number, int) for number in numbers):
            float(given.get("scaling_factor", SCALE))
            return given
        error = "sizes must be whole numbers"
    except KeyError as missing:
        error = f"no {missing}"
    except (ValueError, TypeError) as wrong:
        error = wrong
    raise UserError(f"{path} is no config.json of a VAE ({error})")


def _files(source):
    """-> Path of the weights, and of their config.json or None."""
    release = pretrained.find(source)
    path = pretrained.fetch(source)
    if path.is_dir():
        path = _inside(path)
    elif not path.is_file():
        names = (n for n, r in pretrained.PRETRAINED.items() if r.family == "vae")
        raise UserError(f"no VAE at {path}; names are {', '.join(names)}")
    if release is not None and str(source) not in pretrained.PRETRAINED:
        beside = str(source).rpartition("/")[0]
        return path, pretrained.fetch(f"{beside}/config.json")
    config = path.with_name("config.json")
    return path, config if config.is_file() else None


def _inside(folder):
    for place in (folder, folder / "vae"):
        for name in FILES:
            if (place / name).is_file():
                return place / name
    raise UserError(f"{folder} has no {' or '.join(FILES)}, nor has a folder vae in it")


def _params(path, model, config):
    tensors = read_torch_file(path).ema
    names = [name for name in tensors if not name.startswith(TRAINING)]
    names = to_diffusers_names(names, len(model.channels))
    state = {
        name: squeeze_attention(name, tensors[given]) for name, given in names.items()
    }
    try:
        params, spare = to_flax(vae_rules(model), state)
        if spare:
            raise UserError(f"weights have in addition {join_names(sorted(spare))}")
        require_match(_shapes(model), params)
    except UserError as error:
        told = (
            f"described by {config}"
            if config
            else "of sd-vae-ft-mse's size, for lack of a config.json beside the file"
        )
        raise UserError(f"{path} does not hold a VAE {told}: {error}") from error
    return params


@functools.cache
def _shapes(model):
    image = jax.ShapeDtypeStruct((1, model.factor, model.factor, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]
