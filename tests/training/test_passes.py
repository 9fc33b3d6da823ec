"""Several passes in one training step, and several averages of what it trains."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.networks import quick_jit

from sit_jax.diffusion.timesteps import LossSecondMoment
from sit_jax.models.codec import Pixels
from sit_jax.training.state import TrainState
from sit_jax.training.step import make_train_step

pytestmark = pytest.mark.slow  # together they compile for a minute or two

B = 64
TX = optax.chain(optax.trace(0.0), optax.scale(-0.5))  # its state is the gradient


def batch(n=B):
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((n, 2, 2, 1)).astype(np.float32)
    return {"latent": latent, "label": (np.arange(n) % 5).astype(np.int32)}


def toy(passes=None):
    """A network of one weight per pass, and what it and the process were given."""
    seen = []

    def apply(variables, x, t, y, hidden=None):
        seen.append({"t": t, "y": y, "hidden": hidden})
        params = variables["params"]
        return x * (params["plain"] if hidden is None else params["masked"] + hidden)

    def loss(net, data, noise, t):
        out = net(data, t)
        seen[-1] |= {"noise": noise, "data": data}
        return {"loss": jnp.mean((out - noise) ** 2, axis=(1, 2, 3)) * (t + 1)}

    model = types.SimpleNamespace(classes=5, apply=apply)
    if passes:
        model.pass_inputs = passes
        model.bucket_inputs = lambda inputs, shape: (0, [inputs])
    times = lambda key, n: jax.random.randint(key, (n,), 0, 8)
    process = types.SimpleNamespace(
        sample_times=times,
        losses=loss,
        max_time=8,
        num_timesteps=8,
        timestep_map=tuple(range(8)),
        progress=len,
        posterior=len,
        respace=len,
    )
    return model, process, seen


def masked(key, shape):
    n = shape[0]
    return {"": {}, "m_": {"hidden": jax.random.uniform(key, (n, 1, 1, 1))}}


def stepped(passes=masked, data=None, decay=0.9, **options):
    model, process, seen = toy(passes)
    params = {"plain": jnp.float32(0.3), "masked": jnp.float32(0.7)}
    timesteps = options.get("timestep_sampler")
    losses = timesteps.init(process) if timesteps else ()
    state = TrainState.create(
        params, TX, ema_decay=decay, timestep_sampler_state=losses
    )
    made = make_train_step(model, process, TX, ema_decay=decay, **options)
    arguments = (state, Pixels(), data or batch(), jax.random.key(0))
    return made, arguments, seen


def test_a_second_pass_has_its_own_noise_and_labels_but_the_same_times():
    made, arguments, seen = stepped(label_dropout=0.5)
    made(*arguments)
    plain, hidden = seen[0], seen[1]
    for name in ("t", "data"):
        np.testing.assert_array_equal(plain[name], hidden[name])
    assert plain["hidden"] is None and hidden["hidden"].shape == (B, 1, 1, 1)
    noise = [np.ravel(each["noise"]) for each in (plain, hidden)]
    # independent: 256 pairs, five standard errors
    assert abs(np.corrcoef(*noise)[0, 1]) < 5 / 16
    dropped = [np.asarray(each["y"] == 5, float) for each in (plain, hidden)]
    assert abs(np.corrcoef(*dropped)[0, 1]) < 5 / 8
    assert 0.2 < dropped[0].mean() < 0.8 and 0.2 < dropped[1].mean() < 0.8


def test_the_gradient_and_the_metrics_are_those_of_both_passes():
    made, arguments, seen = stepped(decay=(0.9, 0.5), log_quartiles=True)
    new, metrics = made(*arguments)
    exact, losses = {}, {}
    for name, prefix, each in (("plain", "", seen[0]), ("masked", "m_", seen[1])):
        x, noise, t = (np.asarray(each[k], np.float64) for k in ("data", "noise", "t"))
        hidden = 0 if each["hidden"] is None else np.asarray(each["hidden"])
        weight = {"plain": 0.3, "masked": 0.7}[name] + hidden
        error = x * weight - noise
        losses[f"{prefix}loss"] = ((error**2).mean((1, 2, 3)) * (t + 1)).mean()
        exact[name] = (2 * error * x * (t + 1)[:, None, None, None]).mean()
    for name, slope in exact.items():
        assert float(new.opt_state[0].trace[name]) == pytest.approx(slope, rel=1e-5)
    share = np.bincount(np.asarray(seen[0]["t"]) // 2, minlength=4) / B
    for name, loss in losses.items():
        assert float(metrics[name]) == pytest.approx(loss, rel=1e-5)
        quartiles = [float(metrics[f"{name}_q{i}"]) for i in range(4)]
        assert share @ quartiles == pytest.approx(loss, rel=1e-5)
        assert quartiles[0] < quartiles[3]
    for rate, item in ((0.9, "ema"), (0.5, "ema_0.5")):
        for name, start in (("plain", 0.3), ("masked", 0.7)):
            average = rate * start + (1 - rate) * float(new.params[name])
            assert float(new.ema[item][name]) == pytest.approx(average, rel=1e-6)
    norm = np.hypot(*exact.values())
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_parts_of_a_batch_have_the_masks_and_the_losses_of_the_whole():
    options = dict(log_quartiles=True, timestep_sampler=LossSecondMoment(2))
    whole, in_parts = (
        quick_jit(stepped(microbatches=n, **options)[0])(*stepped(**options)[1])
        for n in (1, 4)
    )
    one, other = jax.tree.leaves(whole), jax.tree.leaves(in_parts)
    assert len(one) > 20
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6)


def test_times_chosen_by_loss_learn_from_both_passes_and_weigh_the_gradient():
    chooser = LossSecondMoment(1, 0.1)
    made, (state, *rest), seen = stepped(timestep_sampler=chooser)
    known = chooser.update(
        state.timestep_sampler_state, jnp.arange(8), 1.0 + jnp.arange(8)
    )
    new, metrics = made(state.replace(timestep_sampler_state=known), *rest)
    t = np.asarray(seen[0]["t"])
    weights = 1 / (8 * np.asarray(chooser.probabilities(known))[t])
    total = 0
    for prefix, each in zip(("", "m_"), seen, strict=True):
        hidden = 0 if each["hidden"] is None else each["hidden"]
        out = each["data"] * ((0.3 if prefix == "" else 0.7) + hidden)
        loss = np.mean((out - each["noise"]) ** 2, axis=(1, 2, 3)) * (t + 1)
        assert float(metrics[f"{prefix}loss"]) == pytest.approx(
            float((weights * loss).mean()), rel=1e-5
        )
        total = total + loss
    last = {int(step): float(total[i]) for i, step in enumerate(t)}
    for step, value in last.items():
        assert float(new.timestep_sampler_state.last[step, 0]) == pytest.approx(
            value, rel=1e-5
        )


def test_one_pass_is_the_program_of_a_model_without_passes():
    """And so a SiT or DiT pays nothing for what MDT needs."""
    text = lambda passes: (
        jax.jit(stepped(passes)[0]).lower(*stepped(passes)[1]).as_text()
    )
    assert text(lambda key, shape: {"": {}}) == text(None) != text(masked)


def test_a_masked_loss_that_is_not_finite_skips_the_step():
    def broken(key, shape):
        return {"": {}, "m_": {"hidden": jnp.full((shape[0], 1, 1, 1), jnp.nan)}}

    made, arguments, _ = stepped(broken)
    new, metrics = quick_jit(made)(*arguments)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["m_loss"])
    assert new.skipped_steps.tolist() == [1, 1]
    assert float(new.params["plain"]) == np.float32(0.3)
