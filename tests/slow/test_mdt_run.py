"""A run of a small MDTv2 with everything on: logged, saved, gone on with."""

import jax
import numpy as np
import optax
from helpers import small

from sit_jax import checkpoint
from sit_jax.config import from_json, spec
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.diffusion.timesteps import LossSecondMoment
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.mdt import MDTv2
from sit_jax.parallel.mesh import make_mesh
from sit_jax.samplers.ddpm import DDPM
from sit_jax.trainer import resume
from sit_jax.trainer.loop import train
from sit_jax.training.optimizers import adan


def config(**fields):
    c = small.config()
    c.model = spec(MDTv2, depth=3, width=16, heads=2, decoder=1, classes=5)
    c.process = spec(GaussianDiffusion, objective=mdt_min_snr_loss)
    anneal = spec(optax.linear_schedule, init_value=1e-2, end_value=0.0)
    anneal.transition_steps = 8
    c.optimizer = spec(adan, learning_rate=anneal)
    c.clip = 1.0
    c.sampler = spec(DDPM, steps=2)
    c.timesteps = spec(LossSecondMoment, history=1)
    c.log_quartiles = True
    with c.ignore_type():
        c.ema_decay = (0.9, 0.5)
    c.steps, c.sample_every = 4, 4
    c.update(fields)
    return c


def test_a_run_goes_on_as_if_never_stopped_and_logs_both_passes(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    train(config(steps=2), run)
    folder = run / "checkpoints"
    wanted = {"params", "ema", "ema_0.5", "opt_state", "losses", "meta"}
    assert wanted <= checkpoint.items(folder, 2)
    for where in (run, other):
        train(config(), where)
        assert (where / "samples" / "0000004.png").is_file()
    parts = build_experiment(
        from_json(checkpoint.read_meta(folder, 4)["config"]), TRAINING
    )
    ends = [
        resume.restore_or_init(parts, make_mesh(), 0, where / "checkpoints")[0]
        for where in (run, other)
    ]
    for one, two in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(ends[0].timestep_sampler_state.counts.sum()) == 32
    assert small.losses(run) == small.losses(other)
    for line in small.lines(run):
        for name in ("loss", "mse", "vb", "m_loss", "m_mse", "m_vb"):
            assert line[name] > 0
            assert any(f"{name}_q{i}" in line for i in range(4))
