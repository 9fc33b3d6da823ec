"""A Job, drawn: batch after batch to disk, then into the output, with a manifest."""

import contextlib
import dataclasses
import hashlib
import re
import sys
import time
import zipfile
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from sit_jax import config as configs
from sit_jax.adapters.quantize import quantize_params
from sit_jax.convert import vae
from sit_jax.convert.adapters import apply_adapters
from sit_jax.diffusion import guidance
from sit_jax.diffusion.guidance import is_unguided
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.files import (
    absolute_path,
    as_path,
    atomic_write,
    list_files,
    parse_json,
    remove,
    require_space,
    write_json,
)
from sit_jax.manifest import environment, weights_hash
from sit_jax.models import attention
from sit_jax.models.codec import Latents, get_rounding, rounding_name
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from sit_jax.precision import emulation, policy, probe
from sit_jax.sampling import outputs
from sit_jax.sampling.batch_sampler import BatchSampler
from sit_jax.sampling.noise import load_noise
from sit_jax.sampling.outputs import DAMAGED

STATES = 2 * 2**30  # bytes of a trajectory
MARK = "job.json"
KEY = "part"  # the array in a batch that says whose it is
NAMED = 20  # classes that are named with a set of samples; its manifest has all


@dataclasses.dataclass(frozen=True)
class SamplingContext:
    """What a job needs in memory: networks with weights, codec, devices."""

    job: Any
    parts: Any  # an Experiment
    params: Any
    mesh: Any
    weak: tuple | None  # (model, params) to lead away from
    around: Any  # fn -> fn: precision and emulation
    record: dict  # what the manifest says of it


def build_context(job, opened, weak=None, expected=None):
    """Returns the context of a job from opened weights; expected: their sha256."""
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
    return SamplingContext(job, parts, params, mesh, weak, around, record)


def _with_classes(parts, new):
    """The recipe for a label table that adapters have added rows to."""
    model = parts.model.clone(classes=parts.model.classes + new)
    return dataclasses.replace(parts, model=model)


def run_sampling_job(context, out, overwrite=False, columns=None, frames=False):
    """Draws a SamplingContext's job into `out`; -> lines that say how it went.

    What is there already of the same job is taken over. Of several processes each
    draws some of the batches, and process 0 puts them together. frames: the sampler
    keeps states, and out, a .png, becomes a strip of them with an animation beside it.
    """
    job, begun = context.job, time.perf_counter()
    require_space(out, _needed(context, out))
    start, given, kicks = load_noise(context)
    batch_size = min(job.batch_size, len(job.labels))
    beside = {"weak": context.weak, "kicks": kicks, "around": context.around}
    make = BatchSampler(
        context.parts, context.params, context.mesh, batch_size, **beside
    )
    parts = _parts(out, job, overwrite)
    count = -(-len(job.labels) // make.batch_size)
    todo = multihost.broadcast(parts.checked(count) if multihost.is_primary() else None)
    some = partial(make, job.seed, job.labels, start, given=given)
    mine, seconds = _draw_share(context, out, parts, some, make.batch_size, todo)
    drawn = sum(multihost.all_gather(mine))
    if not multihost.is_primary():
        return []
    _require_all(parts, count)
    found = solver_stats(parts, count)
    names = context.record.get("class_names")
    outputs.assemble(out, parts, count, job.labels, columns, frames, names)
    record = {
        "job": job.to_json(),
        **context.record,
        "noise_sha256": None if start is None else _sha(start),
        "batch_size": make.batch_size,
        "stats": found,
        "seconds": time.perf_counter() - begun,
        **environment(),
    }
    write_json(outputs.manifest_path(out), record)
    parts.remove()
    return describe_results(context, found, drawn, seconds, make.compile_seconds)


def _draw_share(context, out, parts, some, batch_size, todo):
    """Draws this process's share of the batches -> images drawn, seconds it took.

    some(todo=numbers) -> (data, stats) of each batch; todo: what all processes lack.
    """
    length = len(context.job.labels)
    sizes = np.diff([*range(0, length, batch_size), length])
    there = length - int(sizes[todo].sum())
    todo = todo[multihost.process_index() :: multihost.process_count()]
    mine = int(sizes[todo].sum())
    begun = time.perf_counter()
    with _bar(there, mine) as bar:
        for batch, (data, stats) in zip(todo, some(todo=todo), strict=True):
            parts.save(batch, _finished(context, out, data, stats))
            bar.update(len(data))
    return mine, time.perf_counter() - begun


def _finished(context, out, data, stats):
    """-> what is kept of a batch [n, H, W, C], or of the states on its way."""
    way = stats.pop("trajectory", None)
    data = data if way is None else _checked_way(way)
    made = _pictures(context, data) if outputs.wants_pictures(out) else data
    each = {name: np.broadcast_to(value, len(data)) for name, value in stats.items()}
    return {"images": np.asarray(made), **each}


def _needed(context, out):
    """Bytes still to be written: the batches, and the output made of them."""
    one = jax.ShapeDtypeStruct((1, *context.parts.shape), np.float32)
    if outputs.wants_pictures(out):
        one = jax.eval_shape(_decoded, context.parts.codec, one)
    size = 2 * len(context.job.labels) * one.size * one.dtype.itemsize
    return max(0, size - parts_size(out))


def _parts(out, job, overwrite):
    """Returns PartialResults; process 0 makes the folder, so that one starts over."""
    multihost.assert_equal("the job", job.digest[:12], "their configs or files differ")
    ours = (
        PartialResults(out, job.digest, overwrite, [out])
        if multihost.is_primary()
        else None
    )
    multihost.assert_shared(parts_mark(out))
    return ours or PartialResults(out, job.digest)


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


def _pictures(context, data):
    """float [..., H, W, C] -> uint8 [..., h, w, c], rows split over the devices."""
    flat = data.reshape(-1, *data.shape[-3:])
    missing = -len(flat) % context.mesh.size
    padded = np.concatenate([flat, flat[:1].repeat(missing, 0)])
    there = jax.device_put(padded, batch_sharding(context.mesh))
    images = np.asarray(_decoded(context.parts.codec, there))[: len(flat)]
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


def parts_mark(out):
    """The file that says whose the parts of an output are."""
    return as_path(f"{str(out).rstrip('/')}.parts") / MARK


def parts_size(out):
    """Bytes of the batches that are there."""
    return sum(_files(parts_mark(out).parent).values())


def is_begun(out, path):
    """Whether a run that makes `out`, and may write `path`, was not finished."""
    return str(absolute_path(path)) in _read_mark(parts_mark(out)).get("writes", ())


def remove_parts(out):
    """The mark first: what a kill leaves of it then belongs to nobody."""
    mark = parts_mark(out)
    mark.unlink(missing_ok=True)
    remove(mark.parent)


class PartialResults:
    """A folder beside the output, with one file a batch; it belongs to one digest.

    Those of another digest are refused, or with overwrite removed. writes: paths that
    the run will write, which it may replace when it goes on.
    """

    def __init__(self, out, digest, overwrite=False, writes=()):
        self._out, self._digest = out, digest
        self.folder = parts_mark(out).parent
        writes = [str(absolute_path(path)) for path in writes]
        self._mark({"digest": digest, "writes": writes}, overwrite)

    def missing(self, count):
        """-> numbers of the batches 0 .. count - 1 that are still to be made."""
        there = _files(self.folder)
        return [i for i in range(count) if self._path(i).name not in there]

    def checked(self, count):
        """As missing, of batches that are whole; others are named and removed.

        Before any are made, by one process.
        """
        for path in self.folder.iterdir():
            if path.name.startswith("."):
                remove(path)  # which a kill has left
        for batch in set(range(count)).difference(self.missing(count)):
            if why := self._damage(batch):
                _say(f"{self._path(batch)} {why}: it is removed and made again")
                self._path(batch).unlink()
        return self.missing(count)

    def save(self, batch, arrays):
        """arrays [n, ...] of a batch, by name."""
        with atomic_write(self._path(batch)) as name:
            np.savez(name, **arrays, **{KEY: self._key(batch)})

    def read(self, batch):
        """-> what was saved."""
        with self._opened(batch) as arrays:
            return {name: arrays[name] for name in arrays if name != KEY}

    def images(self, batch):
        return self._array(batch, "images")

    def stats(self, batch, name, default=None):
        return self._array(batch, name, default)

    def remove(self):
        remove_parts(self._out)

    def _mark(self, mark, overwrite):
        path = self.folder / MARK
        found = _read_mark(path)
        if found.get("digest") == mark["digest"]:
            return  # going on
        if self.folder.exists() and not overwrite:
            raise UserError(
                f"{self.folder} holds parts of other samples; finish those with their "
                "own command, or start over with --overwrite"
            )
        if self.folder.exists():
            self._require_ours()
            _say(f"{self.folder} holds parts of another run, which are removed")
            remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, mark)

    def _require_ours(self):
        """Or nobody knows what would be removed."""
        known = {MARK, *_files(self.folder)}
        for path in self.folder.iterdir():
            if path.name not in known and path.name[0] != ".":
                raise UserError(
                    f"{self.folder} holds {path.name}, which is no part of anything; "
                    "move the folder away"
                )

    def _path(self, batch):
        return self.folder / f"{batch:06d}.npz"

    def _key(self, batch):
        return np.array(f"{self._digest} {batch}")

    def _damage(self, batch):
        """What is wrong with a batch that is there, or None; all of it is read."""
        try:
            with self._path(batch).open("rb") as file:
                if odd := zipfile.ZipFile(file).testzip():
                    return f"is damaged (sum of {odd})"
            if self._array(batch, KEY, "") != self._key(batch):
                return "belongs to another run"
        except DAMAGED as error:
            return f"is damaged ({str(error) or type(error).__name__})"

    @contextlib.contextmanager
    def _opened(self, batch):
        """Arrays of a batch by name; only those that are asked for are read."""
        with self._path(batch).open("rb") as file:
            with np.load(file, allow_pickle=False) as arrays:
                yield arrays

    def _array(self, batch, name, default=None):
        with self._opened(batch) as arrays:
            return arrays[name] if default is None or name in arrays else default


def _files(folder):
    """-> {name: bytes} of the batches that are there."""
    there = list_files(folder).items()
    return {name: size for name, size in there if re.fullmatch(r"\d+\.npz", name)}


def _read_mark(path):
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _say(words):
    print(f"WARNING: {words}", file=sys.stderr, flush=True)


def solver_stats(parts, count):
    """Lowest, mean and highest of each number, and the images left unfinished."""
    names = ("evaluations", "accepted", "rejected", "finished")
    found = {name: [] for name in names}
    for batch in range(count):
        for name in names:
            found[name].append(parts.stats(batch, name, default=np.zeros(0)))
    found = {name: np.concatenate(values) for name, values in found.items()}
    unfinished = np.flatnonzero(~found.pop("finished").astype(bool)).tolist()
    numbers = {
        name: {"min": int(v.min()), "mean": float(v.mean()), "max": int(v.max())}
        for name, v in found.items()
        if len(v)
    }
    return {**numbers, "unfinished": unfinished}


def describe_results(context, stats, drawn, seconds, compile_seconds):
    low, high = stats["evaluations"]["min"], stats["evaluations"]["max"]
    count = f"{low}" if low == high else f"{low} to {high}"
    calls = f"{count} network evaluations each"
    if "accepted" in stats:
        steps = {k: f"{stats[k]['mean']:.4g}" for k in ("accepted", "rejected")}
        calls += f" ({steps['accepted']} steps taken, {steps['rejected']} rejected)"
    rate = f"{drawn / max(seconds, 1e-9):.1f} images/s" if drawn else "drawn before"
    guided = "no guidance" if is_unguided(context.parts.guidance) else "guided"
    lines = [
        f"{len(context.job.labels)} images, {guided}, {calls}, {rate} "
        f"(compiled in {compile_seconds:.1f} s)"
    ]
    if names := context.record.get("class_names"):
        shown = ", ".join(f"{y} {name}" for y, name in islice(names.items(), NAMED))
        lines.append(f"classes: {shown}{' ..' * (len(names) > NAMED)}")
    if left := stats["unfinished"]:
        shown = ", ".join(map(str, left[:10])) + (", ..." if len(left) > 10 else "")
        lines.append(
            f"WARNING: the solver gave up before the end in {len(left)} images "
            f"({shown}); take a larger --rtol or --config.sampler.max_steps, or "
            "--sampler heun --steps 50"
        )
    return lines
