"""A run of seconds, and running scripts as a user does."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from helpers.networks import quick_jit

from sit_jax.checkpoint import save_step as save
from sit_jax.cli import train
from sit_jax.config import spec, to_json
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.codec import Pixels
from sit_jax.models.dit import SiT
from sit_jax.recipes import sit
from sit_jax.samplers.fixed_ode import FixedStepODE, heun
from sit_jax.training.state import init_params


def config(**fields):
    """Eight steps of a SiT on random 4x4 pictures, a line of log for each."""
    c = sit()
    c.shape = (4, 4, 1)
    c.model = spec(SiT, depth=2, width=16, heads=2, patch=2, classes=5)
    c.codec = spec(Pixels)
    c.synthetic = True
    c.optimizer.learning_rate = 1e-2  # the head starts at zero and has to get away
    c.batch_size = 8
    c.steps, c.log_every, c.save_every, c.sample_every = 8, 1, 4, 100
    c.preview = 5
    c.sampler = spec(FixedStepODE, method=heun, steps=2)
    c.update(fields)
    return c


def random_params(parts, seed, compiled=True):
    """Parameters with no zero among them: at initialisation every gate is one.

    Their last bits differ by whether the initialisation is compiled.
    """
    key, network = jax.random.key(seed), (parts.model, parts.shape)
    params = compiled_init(*network)(key) if compiled else init_params(*network, key)
    rng = np.random.default_rng(seed)
    kick = lambda w: jnp.asarray(w + 0.2 * rng.standard_normal(w.shape, np.float32))
    return jax.tree.map(kick, jax.device_get(params))


@functools.cache
def compiled_init(model, shape):
    """init_params, compiled once: without jit it takes seconds at every call."""
    return quick_jit(functools.partial(init_params, model, shape))


def checkpoint(directory, config, compiled=True):
    """Saves random parameters, and others as their average, as step 8 of a run."""
    parts = build_experiment(config, TRAINING)
    meta = {"config": to_json(config), "step": 8}
    seeds = {"params": 0, "ema": 10}
    items = {k: random_params(parts, seed, compiled) for k, seed in seeds.items()}
    save(directory, 8, meta, **items)
    return directory


@contextlib.contextmanager
def unprivileged():
    """Root may write everywhere, so it gives that up meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(0)


def lines(workdir):
    """The records of metrics.jsonl."""
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(workdir):
    return {record["step"]: record["loss"] for record in lines(workdir)}


def script(*arguments, **options):
    """Runs a script in a process of its own; -> what subprocess.run gives."""
    words = [sys.executable, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)


def flags_of(name):
    """Returns the flags that --help of a script lists."""
    script = importlib.import_module(f"sit_jax.cli.{name}")
    page = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(page), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit, match="^0$"):
            script.main()
    page.seek(0)
    return set(re.findall(r"--[a-z][\w-]*", page.read()))


def called(main, monkeypatch, capsys, *arguments):
    """Runs a script's main in this process; -> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        out, err = capsys.readouterr()
        return end.code, out, err


FILE = ROOT / "tests" / "helpers" / "small_config.py"


@pytest.fixture
def train_run(monkeypatch, capsys):
    def train_run(*arguments):
        return called(train.main, monkeypatch, capsys, *arguments)

    return train_run


def manifest(path):
    return json.loads(path.with_name(f"{path.name}.manifest.json").read_text())
