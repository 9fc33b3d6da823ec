"""Measures log likelihoods of a data set: one line a record, and their mean.

nats are of what the network models: pixels with noise filling their bins, or latents,
whose figures compare with those of the same latents only. bits_per_dim of pixels is
an upper bound of the bits that an 8-bit value costs; of latents it is nats / (D ln 2)
and no more than another unit.
"""

import csv
import dataclasses
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sit_jax.adapters.apply import apply_model
from sit_jax.config import build, to_json
from sit_jax.convert.open import LoadedWeights
from sit_jax.diffusion import rng
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment, check_data
from sit_jax.files import atomic_write, require_free, write_json
from sit_jax.manifest import environment, weights_hash
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import batch_sharding, make_mesh
from sit_jax.precision import policy
from sit_jax.ranges import COUNT
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.ddpm import DDIM, DDPM
from sit_jax.samplers.likelihood import (
    FlowLikelihood,
    VariationalBound,
    exact_trace,
    hutchinson_trace,
)
from sit_jax.sampling.batch_sampler import chunk_rows, map_fixed_batches
from sit_jax.typing import Batch, DiscreteProcess, Keys, ODESampler

TRACES = {"estimated": hutchinson_trace, "exact": exact_trace}
SPREAD = 0.25  # of Gaussian dequantization, in steps of 8-bit values


def uniform(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, Any]:
    """Returns noise in (-1/2, 1/2) around 8-bit values, and its log density [b]."""
    return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5), 0.0


def gaussian(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, Any]:
    """Returns normal noise cut off at -1/2 and 1/2, and its log density [b]."""
    end = 0.5 / SPREAD
    noise = jax.random.truncated_normal(key, -end, end, shape)
    mass = jax.scipy.special.ndtr(end) - jax.scipy.special.ndtr(-end)
    log_density = -(noise**2) / 2 - jnp.log(jnp.sqrt(2 * jnp.pi) * SPREAD * mass)
    return SPREAD * noise, jnp.sum(log_density, axis=tuple(range(1, len(shape))))


DEQUANTIZATIONS = {"uniform": uniform, "gaussian": gaussian}


def add_flags(parser: ArgumentParser) -> None:
    """Adds the flags of a survey."""
    add = parser.add_argument_group("likelihood, of the config's data").add_argument
    add("--likelihood", action="store_true", help="--out x.csv, by the flow or bound")
    add("--probes", type=COUNT, default=1, metavar="K", help="averaged, of the trace")
    add("--trace", choices=tuple(TRACES), default="estimated")
    add("--dequantization", choices=tuple(DEQUANTIZATIONS), default="uniform")


def check_output(path: Any, overwrite: bool) -> Path:
    """Returns the path of the table; refuses what exists, and other endings."""
    path = require_free(path, overwrite)
    if path.suffix != ".csv":
        raise UserError(f"--out {path}: likelihoods go to a name ending in .csv")
    return path


@dataclasses.dataclass(frozen=True)
class Survey:
    """Says which records to measure, and how, by keys of TRACES and DEQUANTIZATIONS."""

    num: int | None = None
    seed: int = 0
    batch_size: int = 64
    probes: int = 1
    trace: str = "estimated"
    dequantization: str = "uniform"


def measure(
    weights: LoadedWeights, config: ConfigDict, out: Path, item: str, survey: Survey
) -> list[str]:
    """Writes the table and its manifest; returns lines that say what came out."""
    experiment = build_experiment(config)
    if config.synthetic:
        raise UserError(
            "likelihoods are of real data; set --config.source (and synthetic=False)"
        )
    source = build(config.source)
    check_data(experiment, source)
    num = min(len(source), 1000) if survey.num is None else survey.num
    if not 1 <= num <= len(source):
        raise UserError(f"--num {num}: the data has {len(source)} records")
    ids = np.random.default_rng(survey.seed).permutation(len(source))[:num]
    mesh = make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    params = weights.load(item, experiment, mesh)
    precision = policy.get_precision(config.precision.model)
    measure_batch = jax.jit(_measure_batch_fn(experiment, survey, mesh, precision))
    rows = _measure_records(measure_batch, params, source, np.sort(ids), survey, mesh)
    if not multihost.is_primary():
        return []
    with atomic_write(out) as name, open(name, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["record", "label", "nats", "bits_per_dim", "evaluations"])
        table.writerows(rows)
    figures = np.asarray([row[2:4] for row in rows])
    mean = figures.mean(axis=0)
    error = figures.std(axis=0, ddof=min(1, len(rows) - 1)) / np.sqrt(len(rows))
    data = _describe_data(experiment, source)
    record = {
        "config": to_json(config),
        "survey": dataclasses.asdict(survey),
        "of": data,
        "item": item,
        "weights_sha256": weights_hash(params),
        "records": len(rows),
        "nats": {"mean": mean[0], "standard_error": error[0]},
        "bits_per_dim": {"mean": mean[1], "standard_error": error[1]},
        **environment(),
    }
    write_json(f"{out}.manifest.json", record)
    return [
        f"{len(rows)} records, of {data}: {mean[0]:.6g} +- {error[0]:.2g} nats, "
        f"{mean[1]:.5g} +- {error[1]:.2g} bits/dim"
    ]


def _measure_records(measure_batch, params, source, ids, survey, mesh):
    """Returns the rows of the table; each process measures some batches."""
    from tqdm import tqdm

    size = -(-min(survey.batch_size, len(ids)) // mesh.size) * mesh.size
    firsts, rows = range(0, len(ids), size), []
    with tqdm(total=len(ids), unit="image", disable=None) as bar:
        for first in firsts[multihost.process_index() :: multihost.process_count()]:
            real = min(size, len(ids) - first)
            batch_ids = ids[np.minimum(np.arange(first, first + size), len(ids) - 1)]
            records = [source[int(i)] for i in batch_ids]
            batch = {
                name: np.stack([np.asarray(record[name]) for record in records])
                for name in records[0]
            }
            keys = rng.image_keys(survey.seed, jnp.asarray(batch_ids))
            inputs = jax.device_put((keys, batch), batch_sharding(mesh))
            stats = measure_batch(params, *inputs)
            labels = batch["label"]
            columns = np.broadcast_arrays(batch_ids, labels, *stats)
            rows += zip(*(column[:real].tolist() for column in columns), strict=True)
            bar.update(real)
    return sorted(row for rows in multihost.all_gather(rows) for row in rows)


def _measure_batch_fn(experiment, survey, mesh, precision):
    """Returns (params, keys, batch) -> nats, bits per dimension, evaluations."""
    model = policy.with_compute_dtype(precision, experiment.model)
    apply = policy.with_precision(precision, partial(apply_model, model))
    if mesh.devices.flat[0].platform == "cpu":
        apply = map_fixed_batches(apply, mesh, chunk_rows(model))
    process, sampler = experiment.process, experiment.sampler
    dequantize = DEQUANTIZATIONS[survey.dequantization]
    if isinstance(process, DiscreteProcess):
        is_chain = isinstance(sampler, DDPM | DDIM)
        chain = sampler if is_chain else DDPM(process.num_timesteps)
        likelihood = VariationalBound(chain.steps, clip=chain.clip)
        draws, dequantize = rng.step_noise, None
    else:
        is_ode = isinstance(sampler, ODESampler)
        ode = sampler if is_ode else AdaptiveODE(rtol=1e-5, atol=1e-5)
        likelihood = FlowLikelihood(ode, TRACES[survey.trace], survey.probes)
        draws = rng.rademacher_probes

    def measure_batch(params, keys, batch):
        net = lambda x, t: apply(params, x, t, batch["label"])
        data, bits = data_of_records(experiment.codec, keys, batch, dequantize)
        result = likelihood(net, process, data, draws(keys, experiment.shape))
        nats_per_bit = np.prod(experiment.shape) * np.log(2.0)
        return result.nats, bits - result.nats / nats_per_bit, result.num_evaluations

    return measure_batch


def data_of_records(
    codec: Any,
    keys: Keys,
    batch: dict[str, Any],
    dequantize: Callable | None,
) -> tuple[Batch, Any]:
    """Returns what the network models, and the bits per dimension of its discreteness.

    Each record is sampled by its own key, whatever the batch and the devices.

    Args:
        codec: between images and data.
        keys: one for each record.
        batch: records, with "latent", "moments" or "image".
        dequantize: a function of DEQUANTIZATIONS, for pixels; None leaves them.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 7)
    if "latent" in batch and "image" not in batch:
        return batch["latent"], 0.0
    image = batch.get("image")
    moments = batch["moments"] if image is None else codec.encode(image)
    if dequantize is None or image is None or moments.shape != image.shape:
        sample = jax.vmap(lambda key, one: codec.sample(key, one[None])[0])
        return sample(keys, moments), 0.0
    noise, log_density = jax.vmap(lambda k, x: dequantize(k, (1, *x.shape)))(
        keys, moments
    )
    nats_per_bit = np.prod(moments.shape[1:]) * np.log(2.0)
    bits = np.log2(127.5) + jnp.asarray(log_density).reshape(-1) / nats_per_bit
    return moments + noise[:, 0] / 127.5, bits


def _describe_data(experiment, source):
    is_discrete = isinstance(experiment.process, DiscreteProcess)
    bound = "variational bound" if is_discrete else "density"
    size = " x ".join(map(str, experiment.shape))
    is_pixels = "image" in source[0] and experiment.shape == source.shape
    return f"{'pixels' if is_pixels else 'latents'} ({size}), by the {bound}"
