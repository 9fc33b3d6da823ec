"""What the networks and samplers of SiT and DiT, in torch, make of given inputs.

Stages have the names and axes of sit_jax/stages.py.
"""

import importlib

import numpy as np
import torch

from sit_jax import paths, predictions
from sit_jax.codec import Latents, Pixels
from sit_jax.diffusion import Diffusion
from sit_jax.errors import UserError
from sit_jax.guidance import is_none
from sit_jax.interpolant import Interpolant
from sit_jax.rounding import to_uint8_darker
from sit_jax.samplers import ode

PATHS = {paths.linear: "Linear", paths.gvp: "GVP", paths.VP(): "VP"}
PREDICTIONS = {
    predictions.velocity: "velocity",
    predictions.noise: "noise",
    predictions.score: "score",
}
METHODS = {  # torchdiffeq's names
    ode.euler: "euler",
    ode.midpoint: "midpoint",
    ode.heun: "heun2",
    ode.heun3: "heun3",
    ode.rk4: "rk4",
}


def check(room):
    """Refuses what the clones' own scripts cannot do."""
    parts, process = room.parts, room.parts.process
    if room.weak is not None or not isinstance(parts.guidance, float | int):
        raise UserError("the originals' guidance is one number for the whole way")
    if not is_none(parts.guidance) and parts.guidance_channels != 3:
        raise UserError(
            f"the originals guide 3 channels, the manifest {parts.guidance_channels}"
        )
    flow = isinstance(process, Interpolant)
    known = flow and process.path in PATHS and process.predicts in PREDICTIONS
    if not (known and process.sample_margin is None or process == Diffusion()):
        raise UserError(f"the originals have no {process}")


def activations(network, x, t, y):
    """-> {stage: array [n, ...]} in the order of the computation, as bundle.py's."""
    seen = {}
    keep = lambda name: lambda _, inputs, out: seen.__setitem__(name, numpy(out))
    parts = {
        "time embedding": network.t_embedder,
        "label embedding": network.y_embedder,
    }
    parts |= {"patches": network.x_embedder, "final layer": network.final_layer}
    parts |= {f"block {i}": block for i, block in enumerate(network.blocks)}
    hooks = [part.register_forward_hook(keep(n)) for n, part in parts.items()]
    network(x, t, y)
    for hook in hooks:
        hook.remove()
    table = {"patches + positions": seen["patches"] + numpy(network.pos_embed)}
    first = ("time embedding", "label embedding", "patches")
    order = {n: seen[n] for n in first} | table
    order |= {n: seen[n] for n in parts if n.startswith("block ")}
    return order | {"final layer": seen["final layer"]}


def guided(parts, network, y):
    """-> net(x, t), what doubles its batch, and whether there is guidance."""
    if is_none(parts.guidance):
        return lambda x, t: network(x, t, y), lambda a: a, False
    null = torch.full_like(y, parts.model.classes)
    labels = torch.cat([y, null])
    net = lambda x, t: network.forward_with_cfg(x, t, labels, parts.guidance)
    return net, lambda a: torch.cat([a, a]), True


def flow(parts, net, z, guided, steps, found, method):
    """SiT's own transport; -> latents after all steps."""
    transport = importlib.import_module("transport")
    process = parts.process
    made = transport.create_transport(
        PATHS[process.path], PREDICTIONS[process.predicts]
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
    """DiT's own diffusion, by DDIM; -> latents after all steps."""
    diffusion = importlib.import_module("diffusion").create_diffusion(str(steps))
    each = diffusion.ddim_sample_loop_progressive(
        lambda x, t: net(x, t), z.shape, z, clip_denoised=False, device=z.device
    )
    for i, state in enumerate(each):
        last = state["sample"]
        if i == 0:
            found["one Ddim step"] = nhwc(last[: len(z) // (2 if guided else 1)])
    return last


def pictures(room, latents):
    """-> decoded floats and bytes, if there is a way to pictures."""
    codec = room.parts.codec
    if isinstance(codec, Latents):
        return {}
    floats = latents
    if not isinstance(codec, Pixels):
        from diffusers.models import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(room.job.vae).to(latents.device)
        with torch.no_grad():
            floats = vae.decode(latents / codec.scale).sample
    darker = codec.rounding is to_uint8_darker
    levels = (floats + 1) * 127.5 if darker else 127.5 * floats + 128
    levels = levels.clamp(0, 255).to(torch.uint8)
    return {"decoded": nhwc(floats), "uint8": nhwc(levels)}


def numpy(tensor):
    return tensor.detach().cpu().numpy()


def nhwc(tensor):
    return np.ascontiguousarray(numpy(tensor).transpose(0, 2, 3, 1))
