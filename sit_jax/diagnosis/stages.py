"""What a network computes on the way from noise to a picture, stage by stage.

All on one device, so that the shapes, and with them the code that XLA chooses, are the
same whatever else a machine has. Programs are made once for each Line.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.adapters.apply import apply_model
from sit_jax.diagnosis.bundle import INPUTS, Bundle
from sit_jax.diffusion import predictions, rng
from sit_jax.diffusion.guidance import classifier_free_guidance, is_unguided
from sit_jax.errors import UserError
from sit_jax.manifest import environment
from sit_jax.models import inception
from sit_jax.models.layers import sincos_pos_embed_2d
from sit_jax.precision import emulation, policy
from sit_jax.samplers.ddpm import DDIM
from sit_jax.samplers.fixed_ode import FixedStepODE, heun
from sit_jax.sampling import noise
from sit_jax.typing import ContinuousProcess


def collect(room, manifest, path, images=8, steps=50, given=None, judge=None):
    """A SamplingContext and its manifest -> Bundle of its first `images` images.

    given: a Bundle whose noise, times and labels are taken instead. judge: an extractor
    for the features of the pictures, if there are any.
    """
    line, begin = line_of(room, steps), inputs(room, images, given)
    here = lambda tree: jax.device_put(tree, jax.local_devices()[0])
    params = here(room.params)
    weak = None if room.weak is None else here(room.weak[1])
    x, t, y = (jnp.asarray(begin[name]) for name in INPUTS)
    stages = named(activations(line, params, x, t, y), params)
    found, count = _latents(line, params, weak, x, t, y)
    last = f"{steps} steps"
    later = ("guidance", "one Euler step", "one Ddim step", last)
    stages |= {name: found[name] for name in later if name in found}
    stages |= _pictures(here(room.parts.codec), stages[last])
    judged = {} if judge is None else _judged(judge, stages.get("uint8"))
    stages |= judged
    record = {
        "manifest": manifest,
        "architecture": architecture(room),
        "weights": hashes(room.params),
        "precision": room.record["precision"],
        "environment": environment(),
        "solver": {
            "method": getattr(line.method, "__name__", str(line.method)),
            "steps": steps,
            "evaluations": int(count),
        },
        "stages": list(stages),
        **({"evaluation": judge.pipeline} if judged else {}),
    }
    return Bundle(path, record, begin, {n: np.asarray(s) for n, s in stages.items()})


def hashes(params):
    """{name: sha256} of tensors, of stacked blocks one for each layer."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        array = np.asarray(leaf)
        if not names[0].endswith("blocks"):
            found["/".join(names)] = _sha(array)
            continue
        for i, layer in enumerate(array):
            found["/".join([names[0], str(i), *names[1:]])] = _sha(layer)
    return found


def line_of(room, steps):
    """A SamplingContext -> Line; the sampler's own method, where its grid is fixed."""
    parts, words = room.parts, room.record["precision"]
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1")
    method = DDIM
    if isinstance(parts.process, ContinuousProcess):
        method = getattr(parts.sampler, "method", None)
        method = method if isinstance(parts.sampler, FixedStepODE) else heun
    return Line(
        model=dataclasses.replace(parts.model, remat="none"),
        weak=None if room.weak is None else room.weak[0],
        process=parts.process,
        guidance=parts.guidance,
        channels=parts.guidance_channels,
        steps=steps,
        method=method,
        word=words["words"]["model"],
        emulate=words["emulate"],
    )


def inputs(room, images, given=None):
    """-> {name: array} of INPUTS: a Bundle's, or the job's own."""
    found = _own_inputs(room, images) if given is None else given.inputs
    found = {name: np.asarray(found[name]) for name in INPUTS}
    _check_inputs(room, found, given)
    return found


def _own_inputs(room, images):
    """Starting noise, labels, and times spread over the way, of the first images."""
    job, process = room.job, room.parts.process
    count = min(images, len(job.labels))
    if job.noise is None:
        keys = rng.image_keys(job.seed, np.arange(count))
        start = rng.initial_noise(keys, room.parts.shape)
    else:
        start = noise.initial_noise(room)[:count]
    share = (np.arange(count) + 0.5) / count
    if isinstance(process, ContinuousProcess):
        t0, t1 = process.time_interval()
        t = t0 + share * (t1 - t0)
    else:
        told = np.asarray(process.timestep_map)
        t = told[(share * len(told)).astype(int)]
    labels = job.labels[:count].astype(np.int32)
    return {"noise": start, "t": t.astype(np.float32), "labels": labels}


def _check_inputs(room, inputs, given):
    shape, classes = room.parts.shape, room.parts.model.classes
    if given is None:
        return
    if inputs["noise"].shape[1:] != shape:
        raise UserError(
            f"--inputs {given.path} is of noise {inputs['noise'].shape[1:]}, the "
            f"network takes {shape}: another architecture"
        )
    if inputs["labels"].max() >= classes or inputs["labels"].min() < 0:
        raise UserError(f"--inputs {given.path} has labels beyond {classes} classes")


def architecture(room):
    """What must be the same on two sides for their stages to be compared."""
    model = room.parts.model
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    leave = ("parent", "name", "dtype", "remat", "unroll")  # how, and not what
    kept = {n: v for n, v in fields.items() if n not in leave}
    return {"network": type(model).__name__, "shape": list(room.parts.shape), **kept}


@partial(jax.jit, static_argnums=0)
def _latents(line, params, weak, x, t, y):
    """-> {stage: the guided output, one step, all of them}, and evaluations."""

    def network(model, weights):
        return partial(line.around(partial(apply_model, model)), weights)

    settings = (line.model.classes, line.guidance, line.channels)
    other = None if line.weak is None else network(line.weak, weak)
    progress = line.process.progress
    net = classifier_free_guidance(
        network(line.model, params),
        y,
        *settings,
        guiding_model=other,
        progress=progress,
    )
    out = {"guidance": net(x, t)} if not is_unguided(line.guidance) else {}
    if isinstance(line.process, ContinuousProcess):
        t0, t1 = line.process.time_interval()
        velocity = line.process.prediction_fn(net, predictions.velocity)
        slope = velocity(x, jnp.full(len(x), t0, jnp.float32))
        out["one Euler step"] = x + (t1 - t0) / line.steps * slope
        sampler = FixedStepODE(method=line.method, steps=line.steps)
        result = sampler(net, line.process, x)
    else:
        sampler = DDIM(steps=line.steps, trajectory_length=line.steps)
        result = sampler(net, line.process, x)
        out["one Ddim step"] = result.trajectory[0]
    return out | {f"{line.steps} steps": result.data}, result.num_evaluations


def _pictures(codec, latents):
    """-> decoded floats and bytes, if the codec has a way to pictures."""
    try:
        images = codec.decode(latents)
    except UserError:  # latents without a VAE
        return {}
    return {
        "decoded": codec.replace(rounding=_as_it_is).decode(latents),
        "uint8": images,
    }


def _judged(judge, images):
    """uint8 [n, H, W, 1 or 3] or None -> what a network for figures makes of them."""
    if images is None or images.shape[-1] not in (1, 3):
        return {}
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    found = next(judge([images]))
    stages = {"features": found["pool"]}
    if "spatial" in found:  # Inception, which looks at enlarged pictures
        resized = {"resized": np.asarray(inception.preprocess(images))}
        stages = resized | stages | {"spatial features": found["spatial"]}
    return stages


def _as_it_is(x):
    return x.astype(jnp.float32)


def _sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


SEEN = ("time_out", "label", "patch", "head")  # modules whose output is a stage


@dataclasses.dataclass(frozen=True)
class Line:
    """All that decides the programs but the weights."""

    model: Any
    weak: Any
    process: Any
    guidance: Any
    channels: int
    steps: int
    method: Callable  # of the fixed grid
    word: str
    emulate: str | None

    def around(self, fn):
        """fn with the products that the job asked for."""
        fn = policy.with_precision(policy.get_precision(self.word), fn)
        if self.emulate is None:
            return fn
        return emulation.emulate(fn, emulation.emulated_bits(self.emulate))


@partial(jax.jit, static_argnums=0)
def activations(line, params, x, t, y):
    wanted = lambda module, method: (
        method in ("encode", "decode")
        or method == "__call__"
        and str(module.name).endswith((*SEEN, "blocks"))
    )
    see = dict(capture_intermediates=wanted, mutable=["intermediates"])
    run = lambda params, *at: apply_model(line.model, params, *at, **see)
    found = line.around(run)(params, x, t, y)[1]["intermediates"]
    return jax.tree.map(lambda a: a.astype(jnp.float32), found)


def named(found, params):
    """-> {stage: array [n, ...]} in the order of the computation."""
    first = lambda node: np.asarray(node["__call__"][0])
    patches = first(found["patch"])
    tokens = patches.reshape(len(patches), -1, patches.shape[-1])
    table = params.get("positions")
    if table is None:
        table = sincos_pos_embed_2d(patches.shape[1], patches.shape[-1])[None]
    stages = {
        "time embedding": first(found["cond"]["time_out"]),
        "label embedding": first(found["cond"]["label"]),
        "patches": tokens,
        "patches + positions": tokens + np.asarray(table),
    }
    stages |= _blocks(found, ("blocks", "in_blocks", "out_blocks", "encoder_blocks"))
    if "encode" in found:
        stages["encoder"] = np.asarray(found["encode"][0])
    stages |= _blocks(found, ("decoder_blocks",))
    if "decode" in found:
        stages["decoder"] = np.asarray(found["decode"][0])
    return stages | {"final layer": first(found["head"])}


def _blocks(found, names):
    stages = {}
    for name in names:
        if name not in found:
            continue
        node = found[name]  # of a stack of modules, or what MDT keeps of its own
        output = node["__call__"][0][0] if isinstance(node, dict) else node[0]
        word = name.removesuffix("s").replace("_", " ")
        stages |= {f"{word} {i}": layer for i, layer in enumerate(np.asarray(output))}
    return stages
