"""The training step: its average, its parts, its devices, its bad days."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.train_steps import (
    MODEL,
    TX,
    batch,
    equal,
    fresh,
    relative,
    step,
    toy,
    weights,
)

from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.errors import UserError
from sit_jax.models.codec import Pixels
from sit_jax.training.objectives import accumulate_gradients
from sit_jax.training.state import ema_rates
from sit_jax.training.step import make_train_step, tensor_names


def test_the_average_after_one_step_is_the_closed_form():
    """decay of the old and 1 - decay of the new, not the other way round."""
    state = fresh()
    assert equal(state.ema["ema"], state.params)  # in memory of its own:
    new, _ = step(state, batch())  # is given both; a warning would be an error
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    mix = lambda old, now: 0.9 * old + 0.1 * now
    assert relative(new.ema["ema"], jax.tree.map(mix, weights(), new.params)) < 1e-6
    swapped = jax.tree.map(mix, new.params, weights())
    assert relative(new.ema["ema"], swapped) > 1e-3
    assert relative(new.params, weights()) > 1e-3


def test_parts_of_a_batch_give_the_gradient_and_metrics_of_the_whole():
    def loss(w, x, y):
        error = jnp.mean((jnp.tanh(x @ w) - y) ** 2)
        return error, {"loss": error, "largest": jnp.max(w)}

    rng = np.random.default_rng(0)
    w, x, y = (rng.standard_normal(n).astype(np.float32) for n in (5, (16, 5), 16))
    grad = jax.grad(loss, has_aux=True)
    whole, metrics = grad(w, x, y)
    with_rows = lambda w, rows: (*grad(w, *rows), {"y": rows[1]})
    split, others, rows = jax.jit(accumulate_gradients(with_rows, 4))(w, (x, y))
    np.testing.assert_array_equal(rows["y"], y)
    assert relative(split, whole) < 1e-6
    for name, value in metrics.items():
        assert others[name] == pytest.approx(float(value), rel=1e-6)


def poisoned(place):
    state, bad = jax.device_get(fresh()), batch()
    if place == "the batch":
        bad["latent"][3, 2, 1, 0] = np.nan
    else:
        bias = state.params["cond"]["time_in"]["bias"].copy()
        bias[2] = np.inf
        state.params["cond"]["time_in"]["bias"] = bias
    return jax.tree.map(jnp.asarray, state), bad


@pytest.mark.parametrize("place", ["the batch", "cond/time_in/bias"])
def test_a_step_that_is_not_finite_changes_nothing_and_names_the_place(place):
    state, bad = poisoned(place)
    before, names = jax.device_get(state), tensor_names(state)
    after, metrics = step(state, bad)
    assert names[int(metrics["bad"])] == place
    for part in ("params", "ema", "opt_state"):
        assert equal(getattr(after, part), getattr(before, part)), part
    assert int(after.step) == 1
    assert after.skipped_steps.tolist() == metrics["skipped"].tolist() == [1, 1]


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    state, bad = poisoned("the batch")
    counts = []
    for data in (bad, bad, batch(), bad, batch(1)):
        state, metrics = step(state, data)
        counts.append(state.skipped_steps.tolist())
        assert (metrics["bad"] == -1) == np.isfinite(metrics["loss"])
    assert counts == [[1, 1], [2, 2], [2, 0], [3, 1], [3, 0]]
    assert not equal(state.params, weights())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "apply, name",
    [
        # slope 0/0 at 0
        (lambda p, x: x * p["a"]["w"] + jnp.sqrt(p["b"]["w"] ** 2), "gradient of b/w"),
        # gradient 2e25, its square too big
        (
            lambda p, x: x * 0 + 3e12 * p["a"]["w"],
            "the loss or the norm of its gradient",
        ),
    ],
)
def test_a_gradient_or_norm_that_is_not_finite_is_named(apply, name):
    assert toy(apply)[1] == name


def test_bfloat16_is_of_the_network_alone():
    """Eight bits of mantissa are good for a loss within a percent or two."""
    rough = MODEL.clone(dtype="bfloat16")
    inputs = (Pixels(), batch(), jax.random.key(1))
    state, metrics = jax.eval_shape(
        make_train_step(rough, Interpolant(), TX), fresh(), *inputs
    )
    floats = (state.params, state.ema, state.opt_state[0], metrics["loss"])
    assert {leaf.dtype for leaf in jax.tree.leaves(floats)} == {jnp.dtype("float32")}

    @partial(jax.jit, static_argnums=0)
    def loss(model, params, data, labels):
        net = partial(model.apply, {"params": params}, y=labels)
        t = jnp.linspace(0.05, 0.95, len(data))
        return Interpolant().losses(net, data, data[::-1], t)["loss"]

    both = [loss(m, weights(), *batch().values()) for m in (rough, MODEL)]
    assert 1e-5 < relative(*both) < 0.02


@pytest.mark.parametrize(
    "decay, message",
    [((), "give one rate"), ((0.9, 0.9), "several different"), ((0.9, 2.0), "is 2.0")],
)
def test_impossible_rates_of_averages_are_named(decay, message):
    with pytest.raises(UserError, match=f"ema_decay.*{message}"):
        ema_rates(decay)
