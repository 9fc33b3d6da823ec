"""Collects what a network computes from noise to a picture, stage by stage.

All is computed on one device, so that the shapes, and with them the code that XLA
chooses, are the same whatever else a machine has. Each StageProgram compiles once.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from sit_jax.adapters.apply import apply_model
from sit_jax.diagnosis.bundle import EVALUATION, INPUTS, Bundle
from sit_jax.diffusion import predictions, rng
from sit_jax.diffusion.guidance import classifier_free_guidance, is_unguided
from sit_jax.errors import UserError
from sit_jax.evaluation.features import FeatureExtractor
from sit_jax.manifest import environment
from sit_jax.models import inception
from sit_jax.models.layers import sincos_pos_embed_2d
from sit_jax.precision import emulation, policy
from sit_jax.samplers.ddpm import DDIM
from sit_jax.samplers.fixed_ode import FixedStepODE, heun
from sit_jax.sampling.noise import initial_noise
from sit_jax.sampling.run import SamplingContext
from sit_jax.typing import Batch, ContinuousProcess, Labels, Params, Time

MODULES = ("time_out", "label", "patch", "head", "blocks")  # ends of captured names
METHODS = ("encode", "decode")  # of MDT, captured too
NOT_ARCHITECTURE = ("parent", "name", "dtype", "remat", "unroll")  # how, and not what


@dataclasses.dataclass(frozen=True)
class StageProgram:
    """All that decides the compiled programs but the weights.

    Attributes:
      model: the network.
      guiding_model: the network of the guidance, None for the model itself.
      process: what the network was trained on.
      guidance: the scale, or a function of progress.
      channels: how many channels are guided.
      steps: of the fixed grid.
      method: of the fixed grid, DDIM for a discrete process.
      precision: exact, fast or bf16.
      emulate: hardware whose products are emulated, or None.
    """

    model: Any
    guiding_model: Any
    process: Any
    guidance: Any
    channels: int | None
    steps: int
    method: Callable[..., Any]
    precision: str
    emulate: str | None

    def with_precision(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns fn with the products that the job asked for."""
        fn = policy.with_precision(policy.get_precision(self.precision), fn)
        if self.emulate is None:
            return fn
        return emulation.emulate(fn, emulation.emulated_bits(self.emulate))


def collect(
    context: SamplingContext,
    manifest: dict[str, Any],
    path: Path,
    inputs: dict[str, Num[np.ndarray, "n ..."]],
    *,
    steps: int = 50,
    extractor: FeatureExtractor | None = None,
) -> Bundle:
    """Computes the stages of a few images of a job.

    Args:
      context: the job, with its networks and weights.
      manifest: of the samples.
      path: where the bundle will be written.
      inputs: what make_inputs returned.
      steps: of the fixed grid.
      extractor: for the features of the pictures, if there are any.
    """
    program = stage_program(context, steps)
    put = lambda tree: jax.device_put(tree, jax.local_devices()[0])
    params = put(context.params)
    guiding_params = put(context.guiding_model[1]) if context.guiding_model else None
    x, t, y = (jnp.asarray(inputs[name]) for name in INPUTS)
    captured = compute_activations(program, params, x, t, y)
    stages = _name_activations(captured, params)
    latents, evaluations = compute_latents(program, params, guiding_params, x, t, y)
    last = f"{steps} steps"  # jit sorts the names
    order = ("guidance", "one Euler step", "one Ddim step", last)
    stages |= {name: latents[name] for name in order if name in latents}
    stages |= _decode(put(context.experiment.codec), stages[last])
    features = {} if extractor is None else _extract(extractor, stages.get("uint8"))
    stages |= features
    record = {
        "manifest": manifest,
        "architecture": architecture(context),
        "weights": hash_weights(context.params),
        "precision": context.record["precision"],
        "environment": environment(),
        "solver": {
            "method": program.method.__name__,
            "steps": steps,
            "evaluations": int(evaluations),
        },
        "stages": list(stages),
        **({EVALUATION: extractor.pipeline} if features else {}),
    }
    stages = {name: np.asarray(array) for name, array in stages.items()}
    return Bundle(path, record, inputs, stages)


def stage_program(context: SamplingContext, steps: int) -> StageProgram:
    """Returns what to compile, with the sampler's own method if its grid is fixed."""
    experiment, precision = context.experiment, context.record["precision"]
    method = DDIM
    if isinstance(experiment.process, ContinuousProcess):
        fixed = isinstance(experiment.sampler, FixedStepODE)
        method = experiment.sampler.method if fixed else heun
    return StageProgram(
        model=dataclasses.replace(experiment.model, remat="none"),
        guiding_model=context.guiding_model and context.guiding_model[0],
        process=experiment.process,
        guidance=experiment.guidance,
        channels=experiment.guidance_channels,
        steps=steps,
        method=method,
        precision=precision["words"]["model"],
        emulate=precision["emulate"],
    )


def make_inputs(
    context: SamplingContext, images: int = 8, inputs_of: Bundle | None = None
) -> dict[str, Num[np.ndarray, "n ..."]]:
    """Returns arrays of INPUTS: those of a bundle, or of the job's first images.

    The job's are its starting noise, its labels, and times over the whole interval.

    Raises:
      UserError: The bundle's are not of the job's network.
    """
    job, experiment = context.job, context.experiment
    if inputs_of is not None:
        inputs = {name: np.asarray(inputs_of.inputs[name]) for name in INPUTS}
        shape, labels = inputs["noise"].shape[1:], inputs["labels"]
        classes = experiment.model.classes
        if shape != experiment.shape or not (
            0 <= labels.min() <= labels.max() < classes
        ):
            raise UserError(
                f"--inputs {inputs_of.path} is of noise {shape} and {labels.max() + 1} "
                f"classes, the network takes {experiment.shape} and {classes}"
            )
        return inputs
    count = min(images, len(job.labels))
    if job.noise is None:
        keys = rng.image_keys(job.seed, np.arange(count))
        noise = rng.initial_noise(keys, experiment.shape)
    else:
        noise = initial_noise(context)[:count]
    share = (np.arange(count) + 0.5) / count
    if isinstance(experiment.process, ContinuousProcess):
        t0, t1 = experiment.process.time_interval()
        t = t0 + share * (t1 - t0)
    else:
        timesteps = np.asarray(experiment.process.timestep_map)
        t = timesteps[(share * len(timesteps)).astype(int)]
    labels = job.labels[:count].astype(np.int32)
    return {"noise": np.asarray(noise), "t": t.astype(np.float32), "labels": labels}


def architecture(context: SamplingContext) -> dict[str, Any]:
    """Returns what must be the same on two sides for their stages to be compared."""
    model = context.experiment.model
    names = [f.name for f in dataclasses.fields(model)]
    fields = {n: getattr(model, n) for n in names if n not in NOT_ARCHITECTURE}
    shape = list(context.experiment.shape)
    return {"network": type(model).__name__, "shape": shape, **fields}


def hash_weights(params: Params) -> dict[str, str]:
    """Returns the SHA-256 of each tensor, of stacked blocks one for each layer."""
    hashes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        tensors = {"/".join(names): leaf}
        if names[0].endswith("blocks"):
            block, *rest = names
            tensors = {"/".join([block, str(i), *rest]): x for i, x in enumerate(leaf)}
        for name, tensor in tensors.items():
            data = np.ascontiguousarray(tensor).data
            hashes[name] = hashlib.sha256(data).hexdigest()
    return hashes


# ---- inside the network ----


@partial(jax.jit, static_argnums=0)
def compute_activations(
    program: StageProgram, params: Params, x: Batch, t: Time, y: Labels
) -> dict[str, Any]:
    """Returns the outputs of the modules that are stages, as Flax captures them."""

    def is_stage(module, method):
        return method in METHODS or (
            method == "__call__" and str(module.name).endswith(MODULES)
        )

    def run(params, *inputs):
        capture = {"capture_intermediates": is_stage, "mutable": ["intermediates"]}
        return apply_model(program.model, params, *inputs, **capture)

    _, variables = program.with_precision(run)(params, x, t, y)
    return jax.tree.map(lambda a: a.astype(jnp.float32), variables["intermediates"])


def _name_activations(captured, params):
    """Returns arrays [n, ...] by stage, in the order of the computation."""
    output = lambda node: np.asarray(node["__call__"][0])
    patches = output(captured["patch"])  # (n, rows, columns, d)
    tokens = patches.reshape(len(patches), -1, patches.shape[-1])
    positions = params.get("positions")
    if positions is None:
        positions = sincos_pos_embed_2d(patches.shape[1], patches.shape[-1])[None]
    stages = {
        "time embedding": output(captured["cond"]["time_out"]),
        "label embedding": output(captured["cond"]["label"]),
        "patches": tokens,
        "patches + positions": tokens + np.asarray(positions),
    }
    for name in ("blocks", "in_blocks", "out_blocks", "encoder_blocks"):
        stages |= _name_blocks(captured, name)
    if "encode" in captured:
        stages["encoder"] = np.asarray(captured["encode"][0])
    stages |= _name_blocks(captured, "decoder_blocks")
    if "decode" in captured:
        stages["decoder"] = np.asarray(captured["decode"][0])
    return stages | {"final layer": output(captured["head"])}


def _name_blocks(captured, name):
    if name not in captured:
        return {}
    node = captured[name]  # of a stack of modules, or what MDT captures itself
    outputs = node["__call__"][0][0] if isinstance(node, dict) else node[0]
    stage = name.removesuffix("s").replace("_", " ")
    return {f"{stage} {i}": layer for i, layer in enumerate(np.asarray(outputs))}


# ---- after the network ----


@partial(jax.jit, static_argnums=0)
def compute_latents(
    program: StageProgram,
    params: Params,
    guiding_params: Params | None,
    x: Batch,
    t: Time,
    y: Labels,
) -> tuple[dict[str, Batch], Int[Array, ""]]:
    """Returns the guided output, one step and all steps, and network evaluations."""

    def network(model, params):
        return partial(program.with_precision(partial(apply_model, model)), params)

    guiding = None
    if program.guiding_model is not None:
        guiding = network(program.guiding_model, guiding_params)
    net = classifier_free_guidance(
        network(program.model, params),
        y,
        program.model.classes,
        program.guidance,
        program.channels,
        guiding_model=guiding,
        progress=program.process.progress,
    )
    stages = {} if is_unguided(program.guidance) else {"guidance": net(x, t)}
    if isinstance(program.process, ContinuousProcess):
        t0, t1 = program.process.time_interval()
        velocity = program.process.prediction_fn(net, predictions.velocity)
        slope = velocity(x, jnp.full(len(x), t0, jnp.float32))
        stages["one Euler step"] = x + (t1 - t0) / program.steps * slope
        sampler = FixedStepODE(method=program.method, steps=program.steps)
        result = sampler(net, program.process, x)
    else:
        sampler = DDIM(steps=program.steps, trajectory_length=program.steps)
        result = sampler(net, program.process, x)
        stages["one Ddim step"] = result.trajectory[0]
    return stages | {f"{program.steps} steps": result.data}, result.num_evaluations


def _decode(codec, latents):
    """Returns decoded floats and bytes, if the codec can decode."""
    try:
        images = codec.decode(latents)
    except UserError:  # latents without a VAE
        return {}
    floats = codec.replace(rounding=jnp.float32).decode(latents)
    return {"decoded": floats, "uint8": images}


def _extract(extractor, images):
    """Returns the features of uint8 images [n, h, w, 1 or 3]; nothing of others."""
    if images is None or images.shape[-1] not in (1, 3):
        return {}
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    features = next(extractor([images]))
    if "spatial" not in features:
        return {"features": features["pool"]}
    return {  # Inception looks at enlarged pictures
        "resized": np.asarray(inception.preprocess(images)),
        "features": features["pool"],
        "spatial features": features["spatial"],
    }
