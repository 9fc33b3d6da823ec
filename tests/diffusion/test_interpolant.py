"""Interpolants: conversions, losses and where in time training and sampling go."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import arrays, case, nchw, nhwc, relative
from helpers.samplers import EVERY, PATHS, PREDICTS, assert_close, tiny

from sit_jax.diffusion import predictions
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.loss_weights import (
    likelihood_weight,
    unweighted,
    velocity_weight,
)
from sit_jax.diffusion.paths import expand_dims_like, interpolate, linear
from sit_jax.diffusion.predictions import Prediction
from sit_jax.errors import UserError

G = arrays("sit_transport")
FLOORS = case("sit_transport")["f32_vs_f64"]
WEIGHTS = {
    "None": unweighted,
    "velocity": velocity_weight,
    "likelihood": likelihood_weight,
}
NOISE, DATA, T = nhwc(G["x0"]), nhwc(G["x1"]), jnp.asarray(G["t"])


@functools.cache
def nets():
    """The two networks of the recorded losses: a constant, and the tiny SiT."""
    model, params = tiny()
    labels = jnp.asarray(G["y"])
    run = jax.jit(lambda x, t: model.apply({"params": params}, x, t, labels))
    return {
        "fixed": lambda x, t: jnp.asarray(nhwc(G["fixed_model_output"])),
        "model": run,
    }


def assert_recorded(ours, name):
    assert_close(ours, G[name], FLOORS[name])


@pytest.mark.parametrize("path, predicts", EVERY)
def test_recorded_losses(path, predicts):
    for (net, function), weight in itertools.product(nets().items(), WEIGHTS):
        process = Interpolant(PATHS[path], PREDICTS[predicts], WEIGHTS[weight])
        loss = process.losses(function, DATA, NOISE, T)["loss"]
        assert loss.shape == (3,)
        assert_recorded(loss, f"loss_{net}.{path}.{predicts}.{weight}")


@pytest.mark.parametrize("path, predicts", EVERY)
def test_recorded_drift_and_score(path, predicts):
    process = Interpolant(PATHS[path], PREDICTS[predicts])
    x = jnp.asarray(nhwc(G[f"path.{path}.xt"]))
    targets = {"drift": predictions.velocity, "score": predictions.score}
    for (net, function), name in itertools.product(nets().items(), targets):
        ours = process.prediction_fn(function, targets[name])(x, T)
        assert_recorded(nchw(ours), f"{name}_{net}.{path}.{predicts}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "source, target",
    [("velocity", "score"), ("velocity", "noise"), ("score", "velocity")],
)
def test_recorded_conversions(path, source, target):
    out = jnp.asarray(nhwc(G["fixed_model_output"]))
    x, at = jnp.asarray(nhwc(G[f"path.{path}.xt"])), expand_dims_like(T, out)
    ours = predictions.convert(
        out, x, at, PATHS[path], source=PREDICTS[source], target=PREDICTS[target]
    )
    assert_recorded(nchw(ours), f"path.{path}.{target}_from_{source}")


@pytest.mark.parametrize("path", PATHS)
def test_every_conversion_of_the_truth_is_the_truth(path):
    t = jnp.array([0.1, 0.5, 0.9]).reshape(3, 1, 1, 1)
    x = interpolate(PATHS[path], DATA, NOISE, t)
    truth = {}
    for predicts in (*PREDICTS.values(), predictions.data):
        p, q = predicts(PATHS[path], t)
        truth[predicts] = p * DATA + q * NOISE
    for source, target in itertools.product(truth, truth):
        ours = predictions.convert(
            truth[source], x, t, PATHS[path], source=source, target=target
        )
        # dividing by alpha costs two digits where VP has little of it (0.06 at 0.1)
        assert relative(ours, truth[target]) < 2e-5, (source, target)


@pytest.mark.parametrize("path, predicts", [*EVERY, ("Linear", "data")])
def test_the_truth_has_no_loss_and_swapped_roles_do(path, predicts):
    predicts = PREDICTS.get(predicts, predictions.data)
    process = Interpolant(PATHS[path], predicts)
    p, q = predicts(PATHS[path], expand_dims_like(T, DATA))
    truth = lambda x, t: p * DATA + q * NOISE
    scale = np.mean(np.asarray(truth(None, None)) ** 2)
    assert process.losses(truth, DATA, NOISE, T)["loss"].max() < 1e-10 * max(scale, 1)
    assert process.losses(truth, NOISE, DATA, T)["loss"].max() > 1


def test_a_variance_half_is_dropped():
    net = lambda x, t: jnp.concatenate([x, jnp.full_like(x, 9.0)], axis=-1)
    plain = lambda x, t: x
    process = Interpolant()
    one, other = (process.losses(n, DATA, NOISE, T)["loss"] for n in (net, plain))
    np.testing.assert_array_equal(one, other)
    score = process.prediction_fn(net, predictions.score)
    assert score(jnp.asarray(DATA), T).shape[-1] == 4


@pytest.mark.parametrize("path, predicts", EVERY)
def test_losses_are_finite_at_both_ends(path, predicts):
    for weight in WEIGHTS.values():
        process = Interpolant(PATHS[path], PREDICTS[predicts], weight)
        ends = jnp.array([*process.train_interval(), 0.5], jnp.float32)
        loss = process.losses(lambda x, t: 0.3 * x, DATA, NOISE, ends)["loss"]
        assert np.isfinite(loss).all()


# Where times begin and end, as published: training, ODE, SDE with and without a last
# step of 0.04.
EVERYTHING, INSIDE = ["velocity", "score", "noise"], (0.001, 0.999)
TABLE = [
    (["Linear", "GVP"], ["velocity"], (0, 1), (0, 1), (0, 0.96), (0, 1)),
    (["Linear", "GVP"], ["score", "noise"], INSIDE, INSIDE, (0.001, 0.96), INSIDE),
    (["VP"], EVERYTHING, (0, 0.99999), (0, 0.999), (0, 0.96), (0, 0.999)),
]


@pytest.mark.parametrize("paths, predicts, train, ode, last, no_last", TABLE)
def test_published_intervals(paths, predicts, train, ode, last, no_last):
    for path, predict in itertools.product(paths, predicts):
        process = Interpolant(PATHS[path], PREDICTS[predict])
        assert process.train_interval() == pytest.approx(train, abs=1e-12)
        assert process.time_interval() == pytest.approx(ode, abs=1e-12)
        reverse = process.time_interval(reverse=True)
        assert reverse == pytest.approx(ode[::-1], abs=1e-12)
        assert process.time_interval(last_step=0.04) == pytest.approx(last, abs=1e-12)
        assert process.time_interval(last_step=0.0) == pytest.approx(no_last, abs=1e-12)


def recorded_intervals():
    """-> rows of the recorded table that its own training and samplers can reach."""
    golden, codes = arrays("sit_check_interval"), case("sit_check_interval")["codes"]
    for row, (t0, t1, error) in zip(golden["rows"], golden["t0_t1_error"], strict=True):
        path, predicts, eps, sde, reverse, sampling, form, last = row
        names = codes["path"][path], codes["prediction"][predicts]
        margins = tuple(codes["eps_setting"][eps])
        by_score = codes["diffusion_form"][form] == "SBDM"
        size = codes["last_step_size"][last]
        if (sampling or not (sde or reverse or size)) and not (sde and reverse):
            flags = bool(sde), bool(reverse), bool(sampling), by_score, size
            yield names, margins, flags, None if error else (t0, t1)


def our_interval(names, margins, flags):
    sde, reverse, sampling, by_score, size = flags
    path, predicts = names
    process = Interpolant(PATHS[path], PREDICTS[predicts], unweighted, *margins)
    if not sampling:
        return process.train_interval()
    return process.time_interval(
        by_score=by_score and sde, last_step=size if sde else 0.0, reverse=reverse
    )


def test_recorded_intervals():
    """Equal wherever the original follows what it was told and can be sampled.

    Not compared: a margin that the original ignores (velocity on Linear and GVP) or
    loses (sampling with only one of the two given), the SDE that it starts where it
    divides by 0 (SBDM with velocity), and its VP in reverse (from 1, where it is NaN).
    """
    compared = 0
    for names, margins, flags, theirs in recorded_intervals():
        (path, predicts), (sde, reverse, sampling, by_score, _) = names, flags
        ignored = path != "VP" and predicts == "velocity" and margins != (None, None)
        lost = sampling and (margins[0] is None) != (margins[1] is None)
        divides = path != "VP" and predicts == "velocity" and sde and by_score
        if ignored or lost or divides or (path == "VP" and reverse):
            continue
        assert our_interval(names, margins, flags) == pytest.approx(theirs, abs=1e-6)
        compared += 1
    assert compared == 224


@pytest.mark.parametrize("path, predicts", EVERY)
def test_each_given_margin_is_honoured(path, predicts):
    start = 0.0 if path == "VP" else 0.01  # VP has some data in it from the start
    train = Interpolant(PATHS[path], PREDICTS[predicts], train_eps=0.01)
    sample = Interpolant(PATHS[path], PREDICTS[predicts], sample_eps=0.01)
    usual = Interpolant(PATHS[path], PREDICTS[predicts])
    assert train.train_interval() == sample.time_interval() == (start, 0.99)
    assert sample.time_interval(reverse=True) == (0.99, start)
    assert sample.time_interval(last_step=0.04) == (start, 0.96)
    assert train.time_interval() == usual.time_interval()
    assert sample.train_interval() == usual.train_interval()


def test_a_diffusion_that_is_infinite_at_0_starts_later():
    intervals = {"Linear": (0.001, 1), "GVP": (0.001, 1), "VP": (0, 0.999)}
    for path, interval in intervals.items():
        assert Interpolant(PATHS[path]).time_interval(by_score=True) == interval


def test_margins_of_a_path_of_ones_own():
    cubic = lambda t: (t**3, 1 - t**3)  # like Linear
    root = lambda t: (jnp.sqrt(t), 1 - t)  # infinitely steep at 0
    assert Interpolant(cubic).time_interval() == (0, 1)
    assert Interpolant(cubic, predictions.noise).time_interval() == (0.001, 0.999)
    assert Interpolant(root).time_interval() == (0.001, 1)
    assert Interpolant(root).train_interval() == (0.001, 1)
    own = Prediction(lambda path, t: (1.0, -1.0))  # of one's own: it is converted
    assert Interpolant(linear, own).time_interval() == (0.001, 0.999)


def test_times_fill_the_interval():
    process = Interpolant(PATHS["GVP"], predictions.score, train_eps=0.2)
    t = process.sample_times(jax.random.key(0), 4000)
    assert t.shape == (4000,) and 0.2 <= t.min() < 0.205 and 0.795 < t.max() <= 0.8
    # the standard error of the mean is 0.6 / sqrt(12 * 4000) = 0.003
    assert abs(t.mean() - 0.5) < 0.015


@pytest.mark.parametrize("margin", [-0.1, 0.5, float("nan")])
@pytest.mark.parametrize("field", ["train_eps", "sample_eps"])
def test_margins_out_of_range_are_refused(field, margin):
    with pytest.raises(UserError, match=f"{field}={margin}"):
        Interpolant(**{field: margin})
