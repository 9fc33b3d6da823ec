"""Runs a sampling job: weights are loaded, batches drawn, outputs and manifest written.

Up to one batch is drawn and written directly. More goes through numbered parts on disk,
so that a long run can be killed and go on.
"""

import contextlib
import dataclasses
import hashlib
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from sit_jax import config as configs
from sit_jax.adapters.quantize import quantize_params
from sit_jax.convert import vae
from sit_jax.convert.adapters import apply_adapters
from sit_jax.convert.open import LoadedWeights
from sit_jax.diffusion import guidance
from sit_jax.diffusion.guidance import is_unguided
from sit_jax.errors import UserError
from sit_jax.experiment import Experiment, build_experiment
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
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.noise import load_noise

MAX_TRAJECTORY = 2 * 2**30  # bytes of a batch's states
MARK = "job.json"
KEY = "part"  # the array in a batch that says whose it is
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
    weak: LoadedWeights | None = None,
    expected: str | None = None,
) -> SamplingContext:
    """Loads the weights of a job, and prints how it is computed.

    Args:
        job: what to draw.
        opened: the job's weights.
        weak: weights of a guiding model, for autoguidance.
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
    if weak is not None:
        other = build_experiment(weak.config)
        guidance.check_guiding_model(experiment, other, job.weak)
        guiding_params = weak.load(job.item, other, mesh)
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
    frames: bool = False,
) -> list[str]:
    """Draws the images of a job into an output, with a manifest beside it.

    Batches that are on disk already, of a killed run of the same job, are not drawn
    again. Of several processes each draws some batches; process 0 assembles them.

    Args:
        context: the loaded job.
        out: a name as outputs.check_output takes it.
        overwrite: whether parts of another job are removed.
        columns: tiles in a row of a .png.
        frames: whether the sampler keeps states on the way; the .png then shows a strip
            of them for each image, with an animation beside it.

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
    if _fits_in_memory(count, out):
        results, num_drawn, seconds = _draw_one_batch(context, out, draw)
    else:
        results = _open_partial_results(out, job, overwrite)
        num_drawn, seconds = _draw_missing(
            context, out, results, draw, sampler.batch_size
        )
        if not multihost.is_primary():
            return []
    stats = solver_stats(results, count)
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
    names = context.record.get("class_names")
    outputs.assemble(out, results, count, job.labels, columns, frames, names)
    results.remove()
    return describe_results(context, stats, num_drawn, seconds, sampler.compile_seconds)


def _fits_in_memory(count, out):
    """Returns whether one batch is drawn and written to a file without parts on disk.

    A folder appears image by image, so that a kill may leave some of them.
    """
    is_folder, begun = out.suffix not in outputs.KINDS, parts_mark(out).parent.exists()
    is_alone = multihost.process_count() == 1
    return count == 1 and is_alone and not is_folder and not begun


def _draw_one_batch(context, out, draw):
    """Returns the only batch, how many images it has and the seconds it took."""
    started = time.perf_counter()
    with _progress_bar(0, len(context.job.labels)) as bar:
        ((data, stats),) = draw()
        results = SingleBatch(_make_arrays(context, out, data, stats))
        bar.update(len(data))
    return results, len(data), time.perf_counter() - started


def _draw_missing(context, out, results, draw, batch_size):
    """Draws and saves the batches that are not on disk, each process some of them.

    draw(todo=numbers) yields (data, stats) of each batch. Returns the number of images
    that all processes have drawn, and the seconds that this one took.
    """
    length = len(context.job.labels)
    sizes = np.diff([*range(0, length, batch_size), length])
    missing = results.check(len(sizes)) if multihost.is_primary() else None
    missing = multihost.broadcast(missing)
    num_there = length - int(sizes[missing].sum())
    todo = missing[multihost.process_index() :: multihost.process_count()]
    mine = int(sizes[todo].sum())
    started = time.perf_counter()
    with _progress_bar(num_there, mine) as bar:
        for batch, (data, stats) in zip(todo, draw(todo=todo), strict=True):
            results.save(batch, _make_arrays(context, out, data, stats))
            bar.update(len(data))
    seconds = time.perf_counter() - started
    num_drawn = sum(multihost.all_gather(mine))
    if multihost.is_primary() and (lost := results.missing(len(sizes))):
        raise UserError(
            f"{results.folder} lacks batch {lost[0]}, which another process has "
            "drawn; it must be on a file system that all hosts share"
        )
    return num_drawn, seconds


def _make_arrays(context, out, data, stats):
    """Returns the arrays [n, ...] kept of a batch: its images, or states, and stats."""
    trajectory = stats.pop("trajectory", None)
    if trajectory is not None:
        if trajectory.nbytes > MAX_TRAJECTORY:
            raise UserError(
                f"a trajectory of {trajectory.nbytes / 1e9:.3g} GB: fewer images or "
                "--trajectory"
            )
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
    images = np.asarray(_decode_on_device(context.experiment.codec, sharded))[
        : len(flat)
    ]
    return images.reshape(*data.shape[:-3], *images.shape[1:])


@jax.jit
def _decode_on_device(codec, data):
    return codec.decode(data)


def _progress_bar(num_there, mine):
    from tqdm import tqdm

    total = num_there + mine
    return tqdm(total=total, initial=num_there, unit=" images", disable=None)


def _sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


class Results(Protocol):
    """Batches of a job that are drawn, by number."""

    def images(self, batch: int) -> np.ndarray: ...

    def stats(self, batch: int, name: str, default: Any = None) -> np.ndarray: ...

    def remove(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class SingleBatch:
    """Results of one batch, in memory."""

    arrays: dict[str, np.ndarray]

    def images(self, batch: int) -> np.ndarray:
        """Returns the images of the batch."""
        return self.arrays["images"]

    def stats(self, batch: int, name: str, default: Any = None) -> np.ndarray:
        """Returns an array of the batch by name, or the default."""
        return self.arrays.get(name, default)

    def remove(self) -> None:
        """Does nothing: no file was written."""


def parts_mark(out: Any) -> Path:
    """Returns the file that says whose the parts of an output are."""
    return as_path(f"{str(out).rstrip('/')}.parts") / MARK


def parts_size(out: Any) -> int:
    """Returns the bytes of the batches that are there."""
    return sum(_batch_files(parts_mark(out).parent).values())


def is_begun(out: Any, path: Any) -> bool:
    """Returns whether an unfinished run that makes `out` may write `path`."""
    return str(absolute_path(path)) in _read_mark(parts_mark(out)).get("writes", ())


def remove_parts(out: Any) -> None:
    """Removes the parts of an output."""
    mark = parts_mark(out)
    mark.unlink(missing_ok=True)  # first: what a kill leaves then belongs to nobody
    remove(mark.parent)


class PartialResults:
    """Results in a folder beside the output, one file a batch, that belong to a job.

    Args:
        out: the output.
        digest: of the job. Parts of another digest are refused, or with overwrite
            removed.
        overwrite: see there.
        writes: paths that the run will write, and may replace when it goes on.
    """

    def __init__(
        self,
        out: Any,
        digest: str,
        overwrite: bool = False,
        writes: Iterable[Any] = (),
    ):
        self._out, self._digest = out, digest
        self.folder = parts_mark(out).parent
        writes = [str(absolute_path(path)) for path in writes]
        self._begin({"digest": digest, "writes": writes}, overwrite)

    def missing(self, count: int) -> list[int]:
        """Returns the numbers of batches below count that are still to be made."""
        there = _batch_files(self.folder)
        return [i for i in range(count) if self._path(i).name not in there]

    def check(self, count: int) -> list[int]:
        """Removes damaged batches, with a warning, and returns those to be made.

        To be called by one process, before any batch is made.
        """
        for path in self.folder.iterdir():
            if path.name.startswith("."):
                remove(path)  # which a kill has left
        for batch in set(range(count)).difference(self.missing(count)):
            if damage := self._damage(batch):
                _warn(f"{self._path(batch)} {damage}: it is removed and made again")
                self._path(batch).unlink()
        return self.missing(count)

    def save(self, batch: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes arrays [n, ...] of a batch, by name."""
        with atomic_write(self._path(batch)) as name:
            np.savez(name, **arrays, **{KEY: self._key(batch)})

    def read(self, batch: int) -> dict[str, np.ndarray]:
        """Returns the arrays saved of a batch."""
        with self._open(batch) as arrays:
            return {name: arrays[name] for name in arrays if name != KEY}

    def images(self, batch: int) -> np.ndarray:
        """Returns the images of a batch."""
        return self.stats(batch, "images")

    def stats(self, batch: int, name: str, default: Any = None) -> np.ndarray:
        """Returns an array of a batch by name, or the default."""
        with self._open(batch) as arrays:
            return arrays[name] if default is None or name in arrays else default

    def remove(self) -> None:
        """Removes the folder."""
        remove_parts(self._out)

    def _begin(self, mark, overwrite):
        path = self.folder / MARK
        if _read_mark(path).get("digest") == mark["digest"]:
            return  # going on
        if self.folder.exists():
            if not overwrite:
                raise UserError(
                    f"{self.folder} holds parts of other samples; finish those with "
                    "their own command, or start over with --overwrite"
                )
            self._require_only_parts()
            _warn(f"{self.folder} holds parts of another run, which are removed")
            remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, mark)

    def _require_only_parts(self):
        """Refuses to remove a folder with files that are not ours."""
        known = {MARK, *_batch_files(self.folder)}
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
        """Returns what is wrong with a batch, or None; reads all of it."""
        try:
            with self._path(batch).open("rb") as file:
                if member := zipfile.ZipFile(file).testzip():
                    return f"is damaged (sum of {member})"
            if self.stats(batch, KEY, "") != self._key(batch):
                return "belongs to another run"
        except Exception as error:  # see outputs: damage may raise anything
            return f"is damaged ({str(error) or type(error).__name__})"

    @contextlib.contextmanager
    def _open(self, batch):
        """Gives the arrays of a batch; only those that are asked for are read."""
        with self._path(batch).open("rb") as file:
            with np.load(file, allow_pickle=False) as arrays:
                yield arrays


def _batch_files(folder):
    """Returns {name: bytes} of the batches that are there."""
    there = list_files(folder).items()
    return {name: size for name, size in there if re.fullmatch(r"\d+\.npz", name)}


def _read_mark(path):
    try:
        mark = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _warn(message):
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def solver_stats(results: Results, count: int) -> dict[str, Any]:
    """Returns lowest, mean and highest of each number, and the unfinished images.

    Args:
        results: the batches.
        count: how many batches there are.
    """
    names = ("evaluations", "accepted", "rejected", "finished")
    empty = np.zeros(0)
    values = {
        name: np.concatenate([results.stats(i, name, empty) for i in range(count)])
        for name in names
    }
    unfinished = np.flatnonzero(~values.pop("finished").astype(bool)).tolist()
    numbers = {
        name: {"min": int(v.min()), "mean": float(v.mean()), "max": int(v.max())}
        for name, v in values.items()
        if len(v)
    }
    return {**numbers, "unfinished": unfinished}


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
        steps = {k: f"{stats[k]['mean']:.4g}" for k in ("accepted", "rejected")}
        calls += f" ({steps['accepted']} steps taken, {steps['rejected']} rejected)"
    rate = f"{num_drawn / max(seconds, 1e-9):.1f} images/s"
    rate = rate if num_drawn else "drawn before"
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
