"""The training step: its average, its parts, its devices, its draws, its bad days."""

import types
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from sit_jax.codec import Latents, Pixels
from sit_jax.config import spec
from sit_jax.interpolant import Interpolant
from sit_jax.models.dit import SiT
from sit_jax.placement import of_state
from sit_jax.recipe import recipe
from sit_jax.sharding import make_mesh, on, split_batch
from sit_jax.training import (
    fresh_state,
    in_parts,
    init_params,
    make_train_step,
    tensor_names,
)

SHAPE, B = (8, 8, 2), 16
MODEL = SiT(depth=2, width=16, heads=2, patch=2, classes=5)
TX = optax.chain(optax.trace(0.0), optax.scale(-0.02))  # its state is the gradient


@cache
def weights():
    """Random ones everywhere: as drawn, most gradients would be zero."""
    init = partial(init_params, MODEL, SHAPE)
    params = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, params)


def fresh():
    return fresh_state(TX, jax.tree.map(jnp.asarray, weights()))


def batch(seed=0, n=B):
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, *SHAPE)).astype(np.float32)
    return {"latent": latent, "label": rng.integers(5, size=n).astype(np.int32)}


TRAIN_STEP = make_train_step(MODEL, Interpolant(), TX, decay=0.9)
_compiled = jax.jit(TRAIN_STEP, donate_argnums=0)


def step(state, batch):
    return _compiled(state, Pixels(), batch, jax.random.key(1))


def relative(ours, theirs):
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    ours, theirs = flat(ours), flat(theirs)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def equal(one, other):
    same = lambda a, b: np.array_equal(a, b)
    return jax.tree.all(jax.tree.map(same, jax.device_get(one), jax.device_get(other)))


# The moving average


def test_the_average_starts_as_a_copy_with_memory_of_its_own():
    state = fresh()
    assert equal(state.ema, state.params)
    new, _ = step(state, batch())  # donates both
    assert not equal(new.ema, new.params)


def test_the_average_after_one_step_is_the_closed_form():
    """decay of the old and 1 - decay of the new, not the other way round."""
    new, _ = step(fresh(), batch())
    mix = lambda old, now: 0.9 * old + 0.1 * now
    assert relative(new.ema, jax.tree.map(mix, weights(), new.params)) < 1e-6
    swapped = jax.tree.map(mix, new.params, weights())
    assert relative(new.ema, swapped) > 1e-3
    assert relative(new.params, weights()) > 1e-3


def test_the_average_of_constant_weights_stays():
    state, _ = toy(lambda p, x: x * 0 + p["a"]["w"], tx=optax.sgd(0.0))
    assert equal(state.params, state.ema) and state.step == 1


# Parts and devices


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_give_the_gradient_and_metrics_of_the_whole(parts):
    def loss(w, x, y):
        error = jnp.mean((jnp.tanh(x @ w) - y) ** 2)
        return error, {"loss": error, "largest": jnp.max(w)}

    rng = np.random.default_rng(0)
    w, x, y = (rng.standard_normal(n).astype(np.float32) for n in (5, (16, 5), 16))
    grad = jax.grad(loss, has_aux=True)
    whole, metrics = grad(w, x, y)
    split, others = jax.jit(in_parts(grad, parts))(w, x, y)
    assert relative(split, whole) < 1e-6
    for name, value in metrics.items():
        assert others[name] == pytest.approx(float(value), rel=1e-6)


def on_mesh(mesh, accumulate):
    """-> a step, and its first state, placed on a mesh as train.py does."""
    shapes = jax.eval_shape(partial(fresh_state, TX), weights())
    where = of_state(mesh, shapes)
    made = make_train_step(MODEL, Interpolant(), TX, 0.9, accumulate=accumulate)
    run = jax.jit(on(mesh, made), donate_argnums=0, out_shardings=(where, None))
    state = jax.jit(partial(fresh_state, TX), out_shardings=where)(weights())

    def placed(state, batch):
        batch = jax.device_put(batch, split_batch(mesh))
        state, metrics = run(state, Pixels(), batch, jax.random.key(1))
        assert jax.tree.map(lambda x: x.sharding, state) == where
        return state, metrics

    return placed, state


def first_losses(step, state):
    losses = []
    for i in range(5):
        state, metrics = step(state, batch(i))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 5
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    return first_losses(step, fresh())[0]


def test_parts_of_a_batch_on_eight_devices_give_the_losses_of_one(one_device):
    """Only the order of sums differs, which costs a few units of 1e-7."""
    losses, _ = first_losses(*on_mesh(make_mesh(), 2))
    np.testing.assert_allclose(losses, one_device, rtol=1e-6)


def test_the_state_is_given_away_whole():
    """The old one's memory is the new one's; a warning here would be an error."""
    state = fresh()
    new, _ = step(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


# What is not finite


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
    assert after.skipped.tolist() == metrics["skipped"].tolist() == [1, 1]


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    state, bad = poisoned("the batch")
    counts = []
    for data in (bad, bad, batch(), bad, batch(1)):
        state, metrics = step(state, data)
        counts.append(state.skipped.tolist())
        assert (metrics["bad"] == -1) == np.isfinite(metrics["loss"])
    assert counts == [[1, 1], [2, 2], [2, 0], [3, 1], [3, 0]]
    assert not equal(state.params, weights())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def toy(apply, tx=TX):
    """One step of a model of two parameters; -> state, what of it was not finite."""
    params = {"a": {"w": jnp.ones(())}, "b": {"w": jnp.zeros(())}}
    model = types.SimpleNamespace(
        classes=5, apply=lambda variables, x, t, y: apply(variables["params"], x)
    )
    state = fresh_state(tx, params)
    made = make_train_step(model, Interpolant(), tx)
    new, metrics = jax.jit(made)(state, Pixels(), batch(), jax.random.key(0))
    return new, tensor_names(state)[int(metrics["bad"])]


def test_a_gradient_that_is_not_finite_is_named():
    root = lambda p, x: x * p["a"]["w"] + jnp.sqrt(p["b"]["w"] ** 2)  # slope 0/0 at 0
    assert toy(root)[1] == "gradient of b/w"


def test_finite_gradients_with_a_norm_that_overflows_are_named():
    huge = lambda p, x: x * 0 + 3e12 * p["a"]["w"]  # gradient 2e25, its square too big
    assert toy(huge)[1] == "the loss or the norm of its gradient"


# What is random


def drawn(at=0, drop=0.1, seed=1, n=4096):
    """The draws of one step: data from the codec, noise, times, labels kept."""
    seen = {}

    def loss(net, data, noise, t):
        seen.update(data=data, noise=noise, t=t)
        return {"loss": jnp.mean(net(data, t), axis=(1, 2, 3))}

    def apply(variables, x, t, y):
        seen.update(y=y)
        return x * variables["params"]["w"]

    model = types.SimpleNamespace(classes=5, apply=apply)
    process = types.SimpleNamespace(times=Interpolant().times, loss=loss)
    state = fresh_state(TX, {"w": jnp.ones(())}).replace(step=jnp.int32(at))
    moments = np.zeros((n, 2, 2, 2), np.float32)  # mean 0, log variance 0
    label = np.arange(n, dtype=np.int32) % 5
    train_step = make_train_step(model, process, TX, drop=drop)
    inputs = {"moments": moments, "label": label}
    train_step(state, Latents(scale=1.0), inputs, jax.random.key(seed))
    return jax.device_get(seen)


def test_data_noise_times_and_labels_are_drawn_independently():
    """Correlations of n independent pairs stay below 5 / sqrt(n)."""
    found = drawn()
    data, noise = found["data"].ravel(), found["noise"].ravel()
    assert abs(np.corrcoef(data, noise)[0, 1]) < 5 / data.size**0.5
    kinds = [found["data"][:, 0, 0, 0], found["noise"][:, 0, 0, 0], found["t"]]
    kinds += [found["y"] == 5, np.roll(found["t"], 1)]
    off_diagonal = np.corrcoef(np.stack(kinds).astype(float)) - np.eye(len(kinds))
    assert np.abs(off_diagonal).max() < 5 / len(found["t"]) ** 0.5
    for normal in (data, noise):
        assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    assert abs(found["t"].mean() - 0.5) < 0.025


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_the_rate_at_which_labels_are_dropped(rate):
    y = drawn(drop=rate)["y"]
    spread = 5 * (rate * (1 - rate) / len(y)) ** 0.5
    assert abs(np.mean(y == 5) - rate) <= spread
    np.testing.assert_array_equal(y[y != 5], (np.arange(len(y)) % 5)[y != 5])


def test_the_same_step_draws_the_same_and_another_step_or_seed_others():
    first, again = drawn(at=3, n=64), drawn(at=3, n=64)
    assert equal(first, again)
    for other in (drawn(at=4, n=64), drawn(at=3, seed=2, n=64)):
        for name in ("data", "noise", "t"):
            assert not np.isin(first[name], other[name]).any(), name
        assert not np.array_equal(first["y"], other["y"])


# Optimizers and precision


def length_of_update(learning_rate, clip=None, after=0):
    """What a config's optimizer makes of a gradient of length 2."""
    c = small.config(clip=clip)
    c.optimizer = spec(optax.sgd, learning_rate=learning_rate)
    tx, gradient = recipe(c).tx, {"w": jnp.array([1.2, 1.6])}
    state = tx.init(gradient)
    for _ in range(after + 1):
        update, state = tx.update(gradient, state, gradient)
    return float(optax.tree.norm(update))


@pytest.mark.parametrize("clip, length", [(None, 1.0), (3.0, 1.0), (0.2, 0.1)])
def test_the_gradient_is_clipped_to_its_global_norm_before_the_optimizer(clip, length):
    assert length_of_update(0.5, clip) == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("at, length", [(0, 0.0), (2, 0.5), (4, 1.0), (9, 1.0)])
def test_a_learning_rate_may_be_a_schedule(at, length):
    ramp = spec(
        optax.linear_schedule, init_value=0.0, end_value=0.5, transition_steps=4
    )
    assert length_of_update(ramp, after=at) == pytest.approx(length, rel=1e-5)


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
        return Interpolant().loss(net, data, data[::-1], t)["loss"]

    both = [loss(m, weights(), *batch().values()) for m in (rough, MODEL)]
    assert 1e-5 < relative(*both) < 0.02
