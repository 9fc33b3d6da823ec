"""Twenty steps of the original training loops, replayed through our training step.

The step is the real one; only its draws are the recorded ones. Labels come as they
were after dropout, and ours drops none.
"""

import argparse
import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from helpers.recorded import FOLDER, arrays, case, nhwc, relative, weights

from sit_jax.config import build, spec
from sit_jax.convert.rules import DIT_RULES, to_flax, to_torch
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.models.codec import Pixels
from sit_jax.models.dit import DiT, SiT
from sit_jax.training.state import TrainState
from sit_jax.training.step import make_train_step

FAMILIES = {"sit": (SiT, Interpolant()), "dit": (DiT, GaussianDiffusion())}
STEPS, LR = 20, 1e-4


@dataclasses.dataclass
class Replayed:
    """A process whose draws are given, and that tells the loss of every row."""

    process: Any
    t: jax.Array
    noise: jax.Array

    def sample_times(self, key, n):
        return self.t

    def losses(self, net, data, noise, t):
        assert noise.shape == self.noise.shape
        terms = self.process.losses(net, data, self.noise, t)
        rows = {f"row{i}": loss for i, loss in enumerate(terms["loss"])}
        return terms | rows


@pytest.fixture(scope="module", params=["sit", "dit"])
def curve(request):
    """-> name, states (torch names) of step 1 and 20, metrics of all steps."""
    name = request.param
    make, process = FAMILIES[name]
    recorded = arrays(f"train_curve_{name}")
    m = case(f"train_curve_{name}")["model"]
    model = make(m["depth"], m["hidden_size"], m["num_heads"], classes=m["num_classes"])
    tx = build(spec(optax.adamw, learning_rate=LR, weight_decay=0.0))

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        replayed = Replayed(process, batch["t"], batch["noise"])
        train_step = make_train_step(
            model, replayed, tx, ema_decay=0.9999, label_dropout=0.0
        )
        return train_step(state, Pixels(), batch, jax.random.key(0))

    params, spare = to_flax(DIT_RULES, weights(f"train_{name}_init"))
    assert spare == {"pos_embed"}
    state, first, metrics = TrainState.create(params, tx), None, []
    for i in range(STEPS):
        batch = {
            "latent": nhwc(recorded["x1"][i]),
            "noise": nhwc(recorded["x0"][i]),
            "t": recorded["t"][i].astype(np.int32 if name == "dit" else np.float32),
            "label": recorded["y_dropped"][i].astype(np.int32),
        }
        state, metric = step(state, batch)
        metrics.append(jax.device_get(metric))
        first = jax.device_get(state) if first is None else first
    return name, first, jax.device_get(state), metrics


def full(name):
    """The checkpoint that the official script wrote at step 20."""
    import torch

    with torch.serialization.safe_globals([argparse.Namespace]):
        file = FOLDER / "weights" / f"train_{name}_full.pt"
        return torch.load(file, weights_only=True)


def without_keys(name, array):
    """Cuts the third of a qkv bias that belongs to the keys.

    Softmax does not see it, so its true gradient is zero; Adam makes steps of full
    length out of the rounding noise, in torch as here.
    """
    if not name.endswith("qkv.bias"):
        return array
    q, _, v = np.split(np.asarray(array), 3)
    return np.concatenate([q, v])


def test_the_loss_of_every_row_at_every_step(curve):
    """Rounding alone: torch's own float32 is 6e-7 (SiT), 4e-6 (DiT) off float64."""
    name, _, _, metrics = curve
    recorded = arrays(f"train_curve_{name}")
    ours = np.array([[m[f"row{i}"] for i in range(6)] for m in metrics])
    assert relative(ours, recorded["loss"]) < 2e-6
    for row, theirs in zip(ours, recorded["loss"], strict=True):
        assert relative(row, theirs) < {"sit": 5e-6, "dit": 2e-5}[name]
    for term in ("mse", "vb") if name == "dit" else ():
        means = recorded[f"terms.{term}"].mean(axis=1)
        assert relative([m[term] for m in metrics], means) < 5e-6


def test_the_gradient_of_the_first_step(curve):
    """Adam's first moment is then (1 - b1) times the gradient, before any division.

    DiT has integer times, whose embedding loses digits: torch's own gradient is up to
    4e-5 of its largest entry off float64.
    """
    name, first, _, _ = curve
    found = to_torch(DIT_RULES, first.opt_state[0].mu)
    for key, mu in found.items():
        theirs = arrays(f"train_curve_{name}")[f"grad0.{key}"]
        assert relative(mu / 0.1, theirs) < {"sit": 4e-6, "dit": 4e-5}[name], key


def test_the_weights_after_the_first_and_the_last_step(curve):
    """Ten times what float32 leaves of them in torch, or three ulps of 1.

    Updates are 1e-4 and 1e-3, so a learning rate that is wrong by 10 percent shows.
    """
    name, first, last, _ = curve
    floors = case(f"train_curve_{name}")["param_floor"]
    after_20 = {key: array.numpy() for key, array in full(name)["model"].items()}
    for state, theirs in ((last, after_20), (first, recorded_after_1(name))):
        for key, ours in to_torch(DIT_RULES, state.params).items():
            if key not in theirs:
                continue
            off = np.abs(ours - theirs[key])
            assert off.max() < 2 * STEPS * LR, key  # also what the keys may do
            noisy = key.endswith("qkv.bias")
            floor = 0 if noisy else floors[key]["final_max_abs_diff_f32_f64"]
            assert without_keys(key, off).max() < max(10 * floor, 4e-7), key


def recorded_after_1(name):
    prefix, recorded = "after_step1.", arrays(f"train_curve_{name}")
    found = {k.removeprefix(prefix): v for k, v in recorded.items() if prefix in k}
    assert len(found) == 3
    return found


def test_the_average_after_the_last_step(curve):
    """It moves by 2e-6 only, so two ulps of the weight are what it may be off."""
    name, _, last, _ = curve
    start, theirs = weights(f"train_{name}_init"), full(name)["ema"]
    for key, ours in to_torch(DIT_RULES, last.ema["ema"]).items():
        there = without_keys(key, theirs[key].numpy())
        off = np.abs(without_keys(key, ours) - there).max()
        assert off < 2.4e-7 * max(np.abs(there).max(), 1e-2), key
        if key == "blocks.0.mlp.fc1.bias":  # small values, so the movement is seen
            assert relative(ours - start[key], theirs[key].numpy() - start[key]) < 1e-2


def test_adam_s_moments_after_the_last_step(curve):
    name, _, last, _ = curve
    adam, there = last.opt_state[0], full(name)["opt"]["state"]
    ours = [to_torch(DIT_RULES, moments) for moments in (adam.mu, adam.nu)]
    for i, key in enumerate(case(f"train_curve_{name}")["opt_param_names"]):
        if key == "pos_embed":
            assert i not in there
            continue
        assert int(there[i]["step"]) == adam.count == last.step == STEPS
        for moments, kind in zip(ours, ("exp_avg", "exp_avg_sq"), strict=True):
            # a squared gradient is twice as far off as a gradient
            assert relative(moments[key], there[i][kind].numpy()) < 1e-4, (key, kind)


def test_no_step_was_skipped(curve):
    _, _, last, metrics = curve
    assert last.skipped_steps.tolist() == [0, 0]
    assert all(m["bad"] == -1 for m in metrics)
