"""What the networks and samplers of SiT, DiT and MDT, in torch, make of given inputs.

Stages have the names and axes of sit_jax/diagnosis/stages.py.
"""

import dataclasses
import importlib

import jax
import numpy as np
import torch

from sit_jax.convert.rules import to_torch, vae_rules
from sit_jax.diffusion import paths, predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion, hybrid_loss
from sit_jax.diffusion.guidance import PowerCosine, is_unguided
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.errors import UserError
from sit_jax.models.codec import Latents, Pixels, to_uint8_mdt
from sit_jax.models.mdt import MDT
from sit_jax.samplers import fixed_ode

PATHS = {paths.linear: "Linear", paths.gvp: "GVP", paths.VP(): "VP"}
PREDICTIONS = {
    predictions.velocity: "velocity",
    predictions.noise: "noise",
    predictions.score: "score",
}
METHODS = {  # torchdiffeq's names
    fixed_ode.euler: "euler",
    fixed_ode.midpoint: "midpoint",
    fixed_ode.heun: "heun2",
    fixed_ode.heun3: "heun3",
    fixed_ode.rk4: "rk4",
}


def check(context):
    """Refuses what the clones' own scripts cannot do."""
    parts, process = context.experiment, context.experiment.process
    constant = isinstance(parts.guidance, float | int)
    rising = isinstance(parts.model, MDT) and isinstance(parts.guidance, PowerCosine)
    if context.guiding_model is not None or not (constant or rising):
        raise UserError(
            "the originals' guidance is one number for the whole way, or MDT's rise"
        )
    if not is_unguided(parts.guidance) and parts.guidance_channels != 3:
        raise UserError(
            f"the originals guide 3 channels, the manifest {parts.guidance_channels}"
        )
    if isinstance(process, Interpolant):
        known = process.path in PATHS and process.prediction in PREDICTIONS
        known = known and process.sample_eps is None
    else:  # whatever its loss
        known = (
            dataclasses.replace(process, objective=hybrid_loss) == GaussianDiffusion()
        )
    if not known:
        raise UserError(f"the originals have no {process}")


def activations(network, x, t, y):
    """Returns an array [n, ...] by stage, in bundle.py's order of the computation."""
    seen = {}
    keep = lambda name: lambda _, inputs, out: seen.__setitem__(name, numpy(out))
    parts = {
        "time embedding": network.t_embedder,
        "label embedding": network.y_embedder,
    }
    blocks = _blocks(network)
    parts |= {"patches": network.x_embedder, "final layer": network.final_layer}
    parts |= blocks
    hooks = [part.register_forward_hook(keep(n)) for n, part in parts.items()]
    network(x, t, y)
    for hook in hooks:
        hook.remove()
    order = {n: seen[n] for n in ("time embedding", "label embedding", "patches")}
    order["patches + positions"] = seen["patches"] + numpy(network.pos_embed)
    for name in blocks:
        if name == "decoder block 0":  # it begins where the encoder ends
            order["encoder"] = next(reversed(order.values()))
        order[name] = seen[name]
    if "encoder" in order:
        order["decoder"] = next(reversed(order.values()))
    return order | {"final layer": seen["final layer"]}


def _blocks(network):
    """Returns the module of each stage, in the order of the computation."""
    if hasattr(network, "en_inblocks"):
        runs = {"in block": network.en_inblocks, "out block": network.en_outblocks}
        runs["decoder block"] = network.de_blocks
    elif hasattr(network, "decode_layer"):
        first = len(network.blocks) - network.decode_layer
        runs = {"encoder block": network.blocks[:first]}
        runs["decoder block"] = network.blocks[first:]
    else:
        runs = {"block": network.blocks}
    return {f"{run} {i}": m for run, part in runs.items() for i, m in enumerate(part)}


def guided(parts, network, y):
    """Returns net(x, t), what doubles its batch, and whether there is guidance."""
    if is_unguided(parts.guidance):
        return lambda x, t: network(x, t, y), lambda a: a, False
    labels = torch.cat([y, torch.full_like(y, parts.model.classes)])
    strength = {"cfg_scale": parts.guidance}
    if isinstance(parts.guidance, PowerCosine):
        rise = parts.guidance
        strength = {"cfg_scale": rise.scale, "scale_pow": rise.power}
        strength["diffusion_steps"] = rise.steps
    elif isinstance(parts.model, MDT):
        strength["scale_pow"] = 0.0  # which is the scale all the way
    net = lambda x, t: network.forward_with_cfg(x, t, labels, **strength)
    return net, lambda a: torch.cat([a, a]), True


def flow(parts, net, z, guided, steps, found, method):
    """SiT's own transport; -> latents after all steps."""
    transport = importlib.import_module("transport")
    process = parts.process
    made = transport.create_transport(
        PATHS[process.path], PREDICTIONS[process.prediction]
    )
    sampler = transport.Sampler(made)
    model = lambda x, t: net(x, t)
    margins = (made.train_eps, made.sample_eps)
    settings = dict(sde=False, eval=True, reverse=False, last_step_size=0.0)
    t0, t1 = made.check_interval(*margins, **settings)
    slope = sampler.drift(z, torch.full((len(z),), float(t0)).to(z), model)
    once = z + (t1 - t0) / steps * slope
    found["one Euler step"] = nhwc(once[: len(z) // (2 if guided else 1)])
    # its num_steps are points of the grid
    run = sampler.sample_ode(sampling_method=METHODS[method], num_steps=steps + 1)
    return run(z, model)[-1]


def chain(parts, net, z, guided, steps, found):
    """DiT's or MDT's own diffusion, by DDIM; -> latents after all steps."""
    package = "masked_diffusion" if isinstance(parts.model, MDT) else "diffusion"
    create = importlib.import_module(package).create_diffusion
    diffusion = create(str(steps), learn_sigma=parts.model.learn_sigma)
    each = diffusion.ddim_sample_loop_progressive(
        lambda x, t: net(x, t), z.shape, z, clip_denoised=False, device=z.device
    )
    for i, state in enumerate(each):
        last = state["sample"]
        if i == 0:
            found["one Ddim step"] = nhwc(last[: len(z) // (2 if guided else 1)])
    return last


def pictures(codec, vae, latents):
    """Returns decoded floats and bytes, if there is a way to pictures.

    codec: of an Experiment; vae: autoencoder(codec).
    """
    if isinstance(codec, Latents):
        return {}
    floats = latents
    if vae is not None:
        with torch.no_grad():
            floats = vae.to(latents.device).decode(latents / codec.scale).sample
    darker = codec.rounding is to_uint8_mdt
    levels = (floats + 1) * 127.5 if darker else 127.5 * floats + 128
    levels = levels.clamp(0, 255).to(torch.uint8)
    return {"decoded": nhwc(floats), "uint8": nhwc(levels)}


def autoencoder(codec):
    """Returns diffusers' AutoencoderKL with the weights of a codec.Vae; None of others.

    From ours, so that it also is there where the file has no config.
    """
    if isinstance(codec, Latents | Pixels):
        return None
    try:
        from diffusers.models import AutoencoderKL
    except ImportError as error:
        raise UserError("pictures by PyTorch need pip install diffusers") from error
    model, levels = codec.model, len(codec.model.channels)
    made = AutoencoderKL(
        block_out_channels=model.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=model.layers,
        latent_channels=model.latent,
        norm_num_groups=model.groups,
    )
    params = jax.tree.map(np.asarray, codec.params)
    state = to_torch(vae_rules(model), params)
    made.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in state.items()})
    return made.eval()


def numpy(tensor):
    return tensor.detach().cpu().numpy()


def nhwc(tensor):
    return np.ascontiguousarray(numpy(tensor).transpose(0, 2, 3, 1))
