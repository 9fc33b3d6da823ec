"""A Job, drawn: batch after batch to disk, then into the output, with a manifest."""

import dataclasses
import hashlib
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from sit_jax import config as configs
from sit_jax.adapters.quantize import quantize_params
from sit_jax.convert import vae
from sit_jax.convert.adapters import apply_adapters
from sit_jax.diffusion import guidance
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.files import require_space, write_json
from sit_jax.manifest import environment, weights_hash
from sit_jax.models import attention
from sit_jax.models.codec import Latents, get_rounding, rounding_name
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from sit_jax.precision import emulation, policy, probe
from sit_jax.sampling import outputs
from sit_jax.sampling.generation import Generator
from sit_jax.sampling.parts import Parts, parts_mark, parts_size
from sit_jax.sampling.solved import lines, summary
from sit_jax.sampling.starts import noise_of

STATES = 2 * 2**30  # bytes of a trajectory


@dataclasses.dataclass(frozen=True)
class Studio:
    """What a job needs in memory: networks with weights, codec, devices."""

    job: Any
    parts: Any  # an Experiment
    params: Any
    mesh: Any
    weak: tuple | None  # (model, params) to lead away from
    around: Any  # fn -> fn: precision and emulation
    record: dict  # what the manifest says of it


def studio(job, opened, weak=None, expected=None):
    """-> Studio. opened, weak: opened weights; expected: sha256 they must have."""
    config = configs.from_json(job.config)
    parts = build_experiment(config)
    around, measured, warning = _around(job, config.precision)
    mesh = make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    word = policy.get_precision(config.precision.model)
    params = opened.load(job.item, parts, mesh)
    found = weights_hash(params)
    if expected not in (None, found):
        raise UserError(
            f"{job.weights} has other weights than the manifest's ({found[:12]}, not "
            f"{expected[:12]}); --weights names the right ones, --force takes these"
        )
    record = {"weights_sha256": found, "precision": measured}
    if job.lora:
        worn = apply_adapters(params, job.lora, parts.model, found, job.item)
        params, record["lora"] = worn
        parts = _with_classes(parts, sum(each["new_classes"] for each in worn[1]))
    if job.quantize:
        params = quantize_params(params, job.quantize, job.quantize_skip)
    parts = dataclasses.replace(
        parts, model=policy.with_compute_dtype(word, parts.model)
    )
    if names := opened.meta.get("class_names"):
        record["class_names"] = {
            str(y): names[y] for y in np.unique(job.labels).tolist() if y < len(names)
        }
    parts, record["codec"] = with_codec(parts, job, config.precision.vae, mesh)
    strange = vae.encoder_warning(job.vae, record["codec"], job.weights, opened.meta)
    if weak is not None:
        other = build_experiment(weak.config)
        guidance.check_guiding_model(parts, other, job.weak)
        loaded = weak.load(job.item, other, mesh)
        weak = policy.with_compute_dtype(word, other.model), loaded
        record["weak_sha256"] = weights_hash(weak[1])
    program = f"attention: {attention.attention_name(parts.model)}"
    print(measured["line"], program, *filter(None, [warning, strange]), sep="\n")
    return Studio(job, parts, params, mesh, weak, around, record)


def _with_classes(parts, new):
    """The recipe for a label table that adapters have added rows to."""
    model = parts.model.clone(classes=parts.model.classes + new)
    return dataclasses.replace(parts, model=model)


def draw(room, out, overwrite=False, columns=None, frames=False):
    """Draws a Studio's job into `out`; -> lines that say how it went.

    What is there already of the same job is taken over. Of several processes each
    draws some of the batches, and process 0 puts them together. frames: the sampler
    keeps states, and out, a .png, becomes a strip of them with an animation beside it.
    """
    job, begun = room.job, time.perf_counter()
    require_space(out, _needed(room, out))
    start, given, kicks = noise_of(room)
    batch_size = min(job.batch_size, len(job.labels))
    beside = {"weak": room.weak, "kicks": kicks, "around": room.around}
    make = Generator(room.parts, room.params, room.mesh, batch_size, **beside)
    parts = _parts(out, job, overwrite)
    count = -(-len(job.labels) // make.batch_size)
    todo = multihost.broadcast(parts.checked(count) if multihost.is_primary() else None)
    some = partial(make, job.seed, job.labels, start, given=given)
    mine, seconds = _draw_share(room, out, parts, some, make.batch_size, todo)
    drawn = sum(multihost.all_gather(mine))
    if not multihost.is_primary():
        return []
    _require_all(parts, count)
    found = summary(parts, count)
    names = room.record.get("class_names")
    outputs.assemble(out, parts, count, job.labels, columns, frames, names)
    record = {
        "job": job.to_json(),
        **room.record,
        "noise_sha256": None if start is None else _sha(start),
        "batch_size": make.batch_size,
        "stats": found,
        "seconds": time.perf_counter() - begun,
        **environment(),
    }
    write_json(outputs.manifest_path(out), record)
    parts.remove()
    return lines(room, found, drawn, seconds, make.compile_seconds)


def _draw_share(room, out, parts, some, batch_size, todo):
    """Draws this process's share of the batches -> images drawn, seconds it took.

    some(todo=numbers) -> (data, stats) of each batch; todo: what all processes lack.
    """
    length = len(room.job.labels)
    sizes = np.diff([*range(0, length, batch_size), length])
    there = length - int(sizes[todo].sum())
    todo = todo[multihost.process_index() :: multihost.process_count()]
    mine = int(sizes[todo].sum())
    begun = time.perf_counter()
    with _bar(there, mine) as bar:
        for batch, (data, stats) in zip(todo, some(todo=todo), strict=True):
            parts.save(batch, _finished(room, out, data, stats))
            bar.update(len(data))
    return mine, time.perf_counter() - begun


def _finished(room, out, data, stats):
    """-> what is kept of a batch [n, H, W, C], or of the states on its way."""
    way = stats.pop("trajectory", None)
    data = data if way is None else _checked_way(way)
    made = _pictures(room, data) if outputs.wants_pictures(out) else data
    each = {name: np.broadcast_to(value, len(data)) for name, value in stats.items()}
    return {"images": np.asarray(made), **each}


def _needed(room, out):
    """Bytes still to be written: the batches, and the output made of them."""
    one = jax.ShapeDtypeStruct((1, *room.parts.shape), np.float32)
    if outputs.wants_pictures(out):
        one = jax.eval_shape(_decoded, room.parts.codec, one)
    size = 2 * len(room.job.labels) * one.size * one.dtype.itemsize
    return max(0, size - parts_size(out))


def _parts(out, job, overwrite):
    """-> Parts, made by process 0; two processes must not start over in turn."""
    multihost.assert_equal("the job", job.digest[:12], "their configs or files differ")
    ours = Parts(out, job.digest, overwrite, [out]) if multihost.is_primary() else None
    multihost.assert_shared(parts_mark(out))
    return ours or Parts(out, job.digest)


def _require_all(parts, count):
    if lacking := parts.missing(count):
        raise UserError(
            f"{parts.folder} lacks batch {lacking[0]}, which another process has "
            "drawn; it must be on a file system that all hosts share"
        )


def _around(job, words):
    """-> fn -> fn of the job's precision, what was measured, and a warning or None."""
    word = policy.get_precision(words.model)
    bits = 24 if job.emulate is None else emulation.emulated_bits(job.emulate)

    def around(fn):
        fn = policy.with_precision(word, fn)
        return fn if job.emulate is None else emulation.emulate(fn, bits)

    found = probe.measure_mantissa_bits(around, word.dtype)
    line = probe.describe_precision(word, found, job.emulate)
    measured = {"words": words.to_dict(), "emulate": job.emulate, **found, "line": line}
    return around, measured, probe.precision_warning(word, found, bits)


def with_codec(parts, job, word, mesh):
    """-> the recipe with the job's VAE and rounding, and what is recorded of them."""
    rounding = get_rounding(job.rounding)
    if job.vae is not None:
        if not isinstance(parts.codec, Latents):
            raise UserError(
                f"the network works on {type(parts.codec).__name__}, not on latents; "
                "leave out --vae"
            )
        parts = vae.with_vae(parts, vae.load_vae(job.vae, word, replicated(mesh)))
    codec = parts.codec.replace(rounding=rounding)
    name = rounding_name(rounding)
    record = {"kind": type(codec).__name__, "rounding": name, **codec.record()}
    return dataclasses.replace(parts, codec=codec), record


def _pictures(room, data):
    """float [..., H, W, C] -> uint8 [..., h, w, c], rows split over the devices."""
    flat = data.reshape(-1, *data.shape[-3:])
    missing = -len(flat) % room.mesh.size
    padded = np.concatenate([flat, flat[:1].repeat(missing, 0)])
    there = jax.device_put(padded, batch_sharding(room.mesh))
    images = np.asarray(_decoded(room.parts.codec, there))[: len(flat)]
    return images.reshape(*data.shape[:-3], *images.shape[1:])


@jax.jit
def _decoded(codec, data):
    return codec.decode(data)


def _checked_way(way):
    if way.nbytes > STATES:
        raise UserError(
            f"a trajectory of {way.nbytes / 1e9:.3g} GB: fewer images or --trajectory"
        )
    return np.swapaxes(way, 0, 1)  # [n, frames, H, W, C]


def _bar(done, mine):
    """Of this process's images, after those that are there already."""
    from tqdm import tqdm

    return tqdm(total=done + mine, initial=done, unit=" images", disable=None)


def _sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
