"""Runs a sampling job: weights are loaded, batches drawn, outputs and manifest written.

Up to one batch is drawn and written directly. More goes through numbered parts on disk,
so that a long run can be killed and go on.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sit_jax import config as configs
from sit_jax.adapters.quantize import quantize_params
from sit_jax.convert import vae
from sit_jax.convert.adapters import apply_adapters
from sit_jax.convert.open import LoadedWeights
from sit_jax.diffusion.guidance import check_guiding_model, is_unguided
from sit_jax.errors import UserError
from sit_jax.experiment import Experiment, build_experiment
from sit_jax.files import require_space, write_json
from sit_jax.manifest import environment, weights_hash
from sit_jax.models import attention
from sit_jax.models.codec import Latents, get_rounding, rounding_name
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from sit_jax.precision import emulation, policy, probe
from sit_jax.sampling import outputs
from sit_jax.sampling.batch_sampler import BatchSampler
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.noise import load_noise
from sit_jax.sampling.partial_results import (
    PartialResults,
    parts_mark,
    parts_size,
    remove_parts,
)

STATS = ("evaluations", "accepted", "rejected", "finished")  # of a SamplerResult
MAX_NAMED = 20  # classes named after a run; the manifest has all


@dataclasses.dataclass(frozen=True)
class SamplingContext:
    """What a job needs in memory: networks with weights, codec, devices.

    guiding_model: (model, params), for autoguidance. with_precision: fn -> fn, puts the
    precision and emulation around each network. record: goes into the manifest.
    """

    job: SamplingJob
    experiment: Experiment
    params: Any
    mesh: jax.sharding.Mesh
    guiding_model: tuple | None
    with_precision: Callable[[Callable], Callable]
    record: dict[str, Any]


def build_context(
    job: SamplingJob,
    opened: LoadedWeights,
    guiding_weights: LoadedWeights | None = None,
    expected: str | None = None,
) -> SamplingContext:
    """Loads the weights of a job, and prints how it is computed.

    Args:
        job: what to draw.
        opened: the job's weights.
        guiding_weights: of a worse network to lead away from, for autoguidance.
        expected: the sha256 that the job's weights must have.

    Raises:
        UserError: the weights are others, or do not go with guidance, VAE or adapters.
    """
    config = configs.from_json(job.config)
    experiment = build_experiment(config)
    with_precision, measured, warning = _precision(job, config.precision)
    precision = policy.get_precision(config.precision.model)
    mesh = make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    params, model, record = _load_params(job, opened, experiment, mesh, expected)
    model = policy.with_compute_dtype(precision, model)
    experiment = dataclasses.replace(experiment, model=model)
    record["precision"] = measured
    if names := opened.meta.get("class_names"):
        record["class_names"] = {
            str(y): names[y] for y in np.unique(job.labels).tolist() if y < len(names)
        }
    experiment, record["codec"] = with_codec(
        experiment, job, config.precision.vae, mesh
    )
    vae_warning = vae.encoder_warning(
        job.vae, record["codec"], job.weights, opened.meta
    )
    guiding_model = None
    if guiding_weights is not None:
        other = build_experiment(guiding_weights.config)
        check_guiding_model(experiment, other, job.weak)
        guiding_params = guiding_weights.load(job.item, other, mesh)
        record["weak_sha256"] = weights_hash(guiding_params)
        other_model = policy.with_compute_dtype(precision, other.model)
        guiding_model = other_model, guiding_params
    attention_line = f"attention: {attention.attention_name(experiment.model)}"
    lines = (measured["line"], attention_line, warning, vae_warning)
    print(*filter(None, lines), sep="\n")
    return SamplingContext(
        job, experiment, params, mesh, guiding_model, with_precision, record
    )


def _load_params(job, opened, experiment, mesh, expected):
    """Returns a job's params with their adapters, the model of these, and a record."""
    params, model = opened.load(job.item, experiment, mesh), experiment.model
    record = {"weights_sha256": weights_hash(params)}
    sha256 = record["weights_sha256"]
    if expected not in (None, sha256):
        raise UserError(
            f"{job.weights} has other weights than the manifest's ({sha256[:12]}, not "
            f"{expected[:12]}); --weights names the right ones, --force takes these"
        )
    if job.lora:
        params, record["lora"] = apply_adapters(
            params, job.lora, model, sha256, job.item
        )
        new_classes = sum(adapter["new_classes"] for adapter in record["lora"])
        model = model.clone(classes=model.classes + new_classes)
    if job.quantize:
        params = quantize_params(params, job.quantize, job.quantize_skip)
    return params, model, record


def run_sampling_job(
    context: SamplingContext,
    out: Path,
    *,
    overwrite: bool = False,
    columns: int | None = None,
) -> list[str]:
    """Draws the images of a job into an output, with a manifest beside it.

    Batches that are on disk already, of a killed run of the same job, are not drawn
    again. Of several processes each draws some batches; process 0 assembles them.

    Args:
        context: the loaded job.
        out: a name as outputs.check_output takes it.
        overwrite: whether parts of another job are removed.
        columns: tiles in a row of a .png.

    Returns:
        Lines for people; none in processes other than 0.
    """
    job, started = context.job, time.perf_counter()
    require_space(out, _bytes_needed(context, out))
    start, step_noise = load_noise(context)
    sampler = BatchSampler(
        context.experiment,
        context.params,
        context.mesh,
        min(job.batch_size, len(job.labels)),
        guiding_model=context.guiding_model,
        num_noise_draws=0 if step_noise is None else len(step_noise),
        with_precision=context.with_precision,
    )
    count = -(-len(job.labels) // sampler.batch_size)
    draw = partial(sampler, job.seed, job.labels, start, recorded=step_noise)
    begun = time.perf_counter()
    if _fits_in_memory(count, out):
        ((data, stats),) = draw()
        arrays, num_drawn = _make_arrays(context, out, data, stats), len(data)
        batches, stats = [arrays], [arrays]
    else:
        results = _open_partial_results(out, job, overwrite)
        num_drawn = _draw_missing(context, out, results, draw, sampler.batch_size)
        if not multihost.is_primary():
            return []
        batches = (results.read(i, ["images"]) for i in range(count))
        stats = [results.read(i, STATS) for i in range(count)]
    seconds, stats = time.perf_counter() - begun, solver_stats(stats)
    record = {
        "job": job.to_json(),
        **context.record,
        "noise_sha256": None if start is None else _sha256(start),
        "batch_size": sampler.batch_size,
        "stats": stats,
        "seconds": time.perf_counter() - started,
        **environment(),
    }
    # first: without it, what a kill leaves would be taken for another's output
    write_json(outputs.manifest_path(out), record)
    images = (batch["images"] for batch in batches)
    names = context.record.get("class_names")
    outputs.assemble(out, images, job.labels, columns, names)
    remove_parts(out)
    return describe_results(context, stats, num_drawn, seconds, sampler.compile_seconds)


def _fits_in_memory(count, out):
    """Returns whether one batch is drawn and written to a file without parts on disk.

    A folder appears image by image, so that a kill may leave some of them.
    """
    is_folder, is_begun = (
        out.suffix not in outputs.KINDS,
        parts_mark(out).parent.exists(),
    )
    is_alone = multihost.process_count() == 1
    return count == 1 and is_alone and not is_folder and not is_begun


def _draw_missing(context, out, results, draw, batch_size):
    """Draws and saves the batches that are not on disk, each process some of them.

    draw(todo=numbers) yields (data, stats) of each batch. Returns the number of images
    that all processes have drawn.
    """
    from tqdm import tqdm

    length = len(context.job.labels)
    sizes = np.diff([*range(0, length, batch_size), length])
    missing = results.check(len(sizes)) if multihost.is_primary() else None
    missing = multihost.broadcast(missing)
    num_there = length - int(sizes[missing].sum())
    todo = missing[multihost.process_index() :: multihost.process_count()]
    num_drawn = int(sizes[todo].sum())
    total = num_there + num_drawn
    with tqdm(total=total, initial=num_there, unit=" images", disable=None) as bar:
        for batch, (data, stats) in zip(todo, draw(todo=todo), strict=True):
            results.save(batch, _make_arrays(context, out, data, stats))
            bar.update(len(data))
    num_drawn = sum(multihost.all_gather(num_drawn))
    if multihost.is_primary() and (lost := results.missing(len(sizes))):
        raise UserError(
            f"{results.folder} lacks batch {lost[0]}, which another process has "
            "drawn; it must be on a file system that all hosts share"
        )
    return num_drawn


def _make_arrays(context, out, data, stats):
    """Returns the arrays [n, ...] kept of a batch: its images, or states, and stats."""
    trajectory = stats.pop("trajectory", None)
    if trajectory is not None:
        data = np.swapaxes(trajectory, 0, 1)  # (n, frames, h, w, c)
    images = _decode(context, data) if outputs.wants_pictures(out) else data
    stats = {name: np.broadcast_to(value, len(data)) for name, value in stats.items()}
    return {"images": np.asarray(images), **stats}


def _bytes_needed(context, out):
    """Returns the bytes still to be written: the batches, and the output of them."""
    one = jax.ShapeDtypeStruct((1, *context.experiment.shape), np.float32)
    if outputs.wants_pictures(out):
        one = jax.eval_shape(_decode_on_device, context.experiment.codec, one)
    size = 2 * len(context.job.labels) * one.size * one.dtype.itemsize
    return max(0, size - parts_size(out))


def _open_partial_results(out, job, overwrite):
    """Returns PartialResults; process 0 makes the folder, so that one starts over."""
    multihost.assert_equal("the job", job.digest[:12], "their configs or files differ")
    results = None
    if multihost.is_primary():
        results = PartialResults(out, job.digest, overwrite, [out])
    multihost.assert_shared(parts_mark(out))
    return results or PartialResults(out, job.digest)


def _precision(job, names):
    """Returns fn -> fn of the job's precision, its record, and a warning or None."""
    precision = policy.get_precision(names.model)
    bits = 24 if job.emulate is None else emulation.emulated_bits(job.emulate)

    def with_precision(fn):
        fn = policy.with_precision(precision, fn)
        return fn if job.emulate is None else emulation.emulate(fn, bits)

    measured = probe.measure_mantissa_bits(with_precision, precision.dtype)
    line = probe.describe_precision(precision, measured, job.emulate)
    record = {"words": names.to_dict(), "emulate": job.emulate, **measured}
    warning = probe.precision_warning(precision, measured, bits)
    return with_precision, {**record, "line": line}, warning


def with_codec(
    experiment: Experiment, job: SamplingJob, precision: str, mesh: jax.sharding.Mesh
) -> tuple[Experiment, dict[str, Any]]:
    """Returns the experiment with the job's VAE and rounding, and their record."""
    rounding = get_rounding(job.rounding)
    if job.vae is not None:
        if not isinstance(experiment.codec, Latents):
            raise UserError(
                f"the network works on {type(experiment.codec).__name__}, not on "
                "latents; leave out --vae"
            )
        loaded = vae.load_vae(job.vae, precision, replicated(mesh))
        experiment = vae.with_vae(experiment, loaded)
    codec = experiment.codec.replace(rounding=rounding)
    name = rounding_name(rounding)
    record = {"kind": type(codec).__name__, "rounding": name, **codec.record()}
    return dataclasses.replace(experiment, codec=codec), record


def _decode(context, data):
    """Returns uint8 [..., h, w, c] of float [..., H, W, C], by all devices."""
    flat = data.reshape(-1, *data.shape[-3:])
    missing = -len(flat) % context.mesh.size
    padded = np.concatenate([flat, flat[:1].repeat(missing, 0)])
    sharded = jax.device_put(padded, batch_sharding(context.mesh))
    images = np.asarray(_decode_on_device(context.experiment.codec, sharded))
    return images[: len(flat)].reshape(*data.shape[:-3], *images.shape[1:])


@jax.jit
def _decode_on_device(codec, data):
    return codec.decode(data)


def _sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def solver_stats(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Returns lowest, mean and highest of each number, and the unfinished images.

    Args:
        batches: arrays [n] of each batch, by the names of STATS.
    """
    stats = {}
    for name in STATS[:-1]:
        if name in batches[0]:
            v = np.concatenate([batch[name] for batch in batches])
            stats[name] = {
                "min": int(v.min()),
                "mean": float(v.mean()),
                "max": int(v.max()),
            }
    finished = [b.get("finished", np.ones(0, bool)) for b in batches]
    unfinished = np.flatnonzero(~np.concatenate(finished).astype(bool))
    return {**stats, "unfinished": unfinished.tolist()}


def describe_results(
    context: SamplingContext,
    stats: dict[str, Any],
    num_drawn: int,
    seconds: float,
    compile_seconds: float,
) -> list[str]:
    """Returns lines about a finished job: images, evaluations, rate, classes."""
    low, high = stats["evaluations"]["min"], stats["evaluations"]["max"]
    count = f"{low}" if low == high else f"{low} to {high}"
    calls = f"{count} network evaluations each"
    if "accepted" in stats:
        accepted, rejected = (stats[k]["mean"] for k in ("accepted", "rejected"))
        calls += f" ({accepted:.4g} steps taken, {rejected:.4g} rejected)"
    rate = f"{num_drawn / seconds:.1f} images/s" if num_drawn else "drawn before"
    guided = "no guidance" if is_unguided(context.experiment.guidance) else "guided"
    lines = [
        f"{len(context.job.labels)} images, {guided}, {calls}, {rate} "
        f"(compiled in {compile_seconds:.1f} s)"
    ]
    if names := context.record.get("class_names"):
        shown = ", ".join(f"{y} {name}" for y, name in islice(names.items(), MAX_NAMED))
        lines.append(f"classes: {shown}{' ..' * (len(names) > MAX_NAMED)}")
    if left := stats["unfinished"]:
        shown = ", ".join(map(str, left[:10])) + (", ..." if len(left) > 10 else "")
        lines.append(
            f"WARNING: the solver gave up before the end in {len(left)} images "
            f"({shown}); take a larger --rtol or --config.sampler.max_steps, or "
            "--sampler heun --steps 50"
        )
    return lines
