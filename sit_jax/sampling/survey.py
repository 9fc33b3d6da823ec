"""Measures log likelihoods of a data set: one line a record, and their mean.

nats are of what the network models: pixels with noise filling their bins, or latents,
whose figures compare with those of the same latents only. bits_per_dim of pixels is
an upper bound of the bits that an 8-bit value costs; of latents it is nats / (D ln 2)
and no more than another unit.
"""

import csv
import dataclasses
from argparse import ArgumentParser
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
from sit_jax.samplers.likelihood import (
    FlowLikelihood,
    VariationalBound,
    exact_trace,
    hutchinson_trace,
)
from sit_jax.sampling.batch_sampler import map_fixed_batches
from sit_jax.typing import DiscreteProcess, ODESampler

TRACES = {"estimated": hutchinson_trace, "exact": exact_trace}
SPREAD = 0.25  # of Gaussian dequantization, in steps of 8-bit values


def uniform(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, Any]:
    """Returns noise in (-1/2, 1/2) around 8-bit values, and its log density [b]."""
    return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5), 0.0


def gaussian(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, Any]:
    """Returns normal noise cut off at -1/2 and 1/2, and its log density [b]."""
    reach = 0.5 / SPREAD
    draw = jax.random.truncated_normal(key, -reach, reach, shape)
    mass = jax.scipy.special.ndtr(reach) - jax.scipy.special.ndtr(-reach)
    each = -(draw**2) / 2 - jnp.log(jnp.sqrt(2 * jnp.pi) * SPREAD * mass)
    return SPREAD * draw, jnp.sum(each, axis=tuple(range(1, len(shape))))


FILLINGS = {"uniform": uniform, "gaussian": gaussian}


def add_flags(parser: ArgumentParser) -> None:
    """Adds the flags of a survey."""
    add = parser.add_argument_group("likelihood, of the config's data").add_argument
    add("--likelihood", action="store_true", help="--out x.csv, by the flow or bound")
    add("--probes", type=COUNT, default=1, metavar="K", help="averaged, of the trace")
    add("--trace", choices=tuple(TRACES), default="estimated")
    add("--dequantization", choices=tuple(FILLINGS), default="uniform")


def check_output(path: Any, overwrite: bool) -> Path:
    """Returns the path of the table; refuses what exists, and other endings."""
    path = require_free(path, overwrite)
    if path.suffix != ".csv":
        raise UserError(f"--out {path}: likelihoods go to a name ending in .csv")
    return path


@dataclasses.dataclass(frozen=True)
class Survey:
    """Says which records to measure, and how, by keys of TRACES and FILLINGS."""

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
    parts = build_experiment(config)
    source = _source(config)
    check_data(parts, source)
    ids = _chosen(len(source), survey)
    mesh = make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    params = weights.load(item, parts, mesh)
    word = policy.get_precision(config.precision.model)
    likelihood = _likelihood(parts, survey)
    batch = -(-min(survey.batch_size, len(ids)) // mesh.size) * mesh.size
    filling = FILLINGS[survey.dequantization]
    run = jax.jit(_run(parts, likelihood, filling, mesh, word))
    rows = []
    with _bar(len(ids)) as bar:
        firsts = range(0, len(ids), batch)
        for first in firsts[multihost.process_index() :: multihost.process_count()]:
            index = np.minimum(np.arange(first, first + batch), len(ids) - 1)
            real = min(batch, len(ids) - first)
            records = [source[int(ids[i])] for i in index]
            arrays = {
                name: np.stack([np.asarray(r[name]) for r in records])
                for name in records[0]
            }
            keys = rng.image_keys(survey.seed, jnp.asarray(ids[index]))
            where = batch_sharding(mesh)
            stats = run(params, *jax.device_put((keys, arrays), where))
            stats = {k: np.broadcast_to(v, (batch,)) for k, v in stats.items()}
            rows += [
                [int(ids[i]), int(records[j]["label"])]
                + [float(stats[name][j]) for name in ("nats", "bits_per_dim")]
                + [int(stats["evaluations"][j])]
                for j, i in enumerate(index[:real])
            ]
            bar.update(real)
    rows = sorted(row for some in multihost.all_gather(rows) for row in some)
    if not multihost.is_primary():
        return []
    return _written(out, rows, config, survey, item, params, parts, source)


def _source(config):
    if config.synthetic:
        raise UserError(
            "likelihoods are of real data; set --config.source (and synthetic=False)"
        )
    return build(config.source)


def _chosen(length, survey):
    """Returns the ids of the records, which the seed decides."""
    num = min(length, 1000) if survey.num is None else survey.num
    if not 1 <= num <= length:
        raise UserError(f"--num {num}: the data has {length} records")
    return np.sort(np.random.default_rng(survey.seed).permutation(length)[:num])


def _likelihood(parts, survey):
    if isinstance(parts.process, DiscreteProcess):
        steps = getattr(parts.sampler, "steps", parts.process.steps)
        return VariationalBound(steps, clip=getattr(parts.sampler, "clip", False))
    ode = parts.sampler
    if not isinstance(ode, ODESampler):
        ode = AdaptiveODE(rtol=1e-5, atol=1e-5)
    return FlowLikelihood(ode, TRACES[survey.trace], survey.probes)


def _run(parts, likelihood, filling, mesh, word):
    model = policy.with_compute_dtype(word, parts.model)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    by_chain = isinstance(likelihood, VariationalBound)
    draws = rng.step_noise if by_chain else rng.rademacher_probes

    def run(params, keys, batch):
        network = policy.with_precision(word, partial(apply_model, model))
        network = map_fixed_batches(network, mesh) if on_cpu else network
        net = lambda x, t: network(params, x, t, batch["label"])
        data, bits = _data(parts, filling, keys, batch, by_chain)
        result = likelihood(net, parts.process, data, draws(keys, parts.shape))
        size = np.prod(parts.shape)
        cost = -result.nats / (size * np.log(2.0)) + bits
        return {
            "nats": result.nats,
            "bits_per_dim": cost,
            "evaluations": result.num_evaluations,
        }

    return run


def _data(parts, filling, keys, batch, by_chain):
    """Returns data [b, h, w, c], and the bits per dimension of its discreteness."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 7)
    if "image" in batch:
        batch = {"moments": parts.codec.encode(batch["image"]), "image": batch["image"]}
    data = batch.get("moments")
    of_latents = "image" not in batch or data.shape != batch["image"].shape
    if by_chain or of_latents:
        return _drawn(parts.codec, keys, batch), 0.0
    fill = jax.vmap(lambda k, x: filling(k, (1, *x.shape)))
    extra, log_density = fill(keys, data)
    size = np.prod(data.shape[1:])
    log_density = jnp.asarray(log_density).reshape(-1)
    bits = np.log2(127.5) + log_density / (size * np.log(2.0))
    return data + extra[:, 0] / 127.5, bits


def _drawn(codec, keys, batch):
    """Samples each record by its own key, whatever the batch and the devices."""
    if "latent" in batch:
        return batch["latent"]
    draw = jax.vmap(lambda key, one: codec.sample(key, one[None])[0])
    return draw(keys, batch["moments"])


def _written(out, rows, config, survey, item, params, parts, source):
    with atomic_write(out) as name, open(name, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["record", "label", "nats", "bits_per_dim", "evaluations"])
        table.writerows(rows)
    numbers = np.asarray([row[2:4] for row in rows])
    mean = numbers.mean(axis=0)
    error = numbers.std(axis=0, ddof=min(1, len(rows) - 1)) / np.sqrt(len(rows))
    of = _named(parts, source)
    record = {
        "config": to_json(config),
        "survey": dataclasses.asdict(survey),
        "of": of,
        "item": item,
        "weights_sha256": weights_hash(params),
        "records": len(rows),
        "nats": {"mean": mean[0], "standard_error": error[0]},
        "bits_per_dim": {"mean": mean[1], "standard_error": error[1]},
        **environment(),
    }
    write_json(f"{out}.manifest.json", record)
    return [
        f"{len(rows)} records, of {of}: {mean[0]:.6g} +- {error[0]:.2g} nats, "
        f"{mean[1]:.5g} +- {error[1]:.2g} bits/dim"
    ]


def _named(parts, source):
    """Says what the figures are of."""
    bound = (
        "variational bound" if isinstance(parts.process, DiscreteProcess) else "density"
    )
    size = " x ".join(map(str, parts.shape))
    kind = (
        "pixels" if "image" in source[0] and parts.shape == source.shape else "latents"
    )
    return f"{kind} ({size}), by the {bound}"


def _bar(total):
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=None)
