"""Means and rates of the log, against a clock that the test turns."""

import math

import jax.numpy as jnp
import pytest

from sit_jax.trainer import meter
from sit_jax.trainer.meter import LAG, Meter


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(meter.time, "perf_counter", lambda: Clock.now)
    return Clock


def step(loss, **more):
    more = {"skipped": jnp.zeros(2, int), "bad": jnp.int32(-1), **more}
    return {"loss": jnp.float32(loss), **more}


def fed(counter, clock, first, losses, seconds=0.5, waited=0.1):
    arrived = []
    for i, loss in enumerate(losses):
        clock.now += seconds
        arrived += counter.add(first + i, step(loss), waited)
    return arrived + counter.flush()


def test_lines_come_at_every_nth_step_with_means_since_the_last(clock):
    arrived = fed(Meter(3, 8, 1e9, 1e10), clock, 1, [1, 2, 6, 4, 5, 9, 7])
    assert [at for at, _, _ in arrived] == [1, 2, 3, 4, 5, 6, 7]
    lines = {at: line for at, _, line in arrived if line is not None}
    assert list(lines) == [3, 6]
    assert lines[3]["loss"] == 3 and lines[6]["loss"] == 6
    assert set(lines[3]) - {"loss"} == {
        "steps_per_second",
        "images_per_second",
        "data_wait",
        "model_tflops",
        "mfu",
    }


def test_rates_are_of_the_steps_between_two_lines(clock):
    counter = Meter(2, images_per_step=8, flops_per_step=3e9, peak=1e10)
    fed(counter, clock, 1, [1, 1], seconds=9.0)
    arrived = fed(counter, clock, 3, [1, 1], seconds=0.5, waited=0.2)
    line = arrived[-1][2]
    assert line["steps_per_second"] == pytest.approx(2.0)
    assert line["images_per_second"] == pytest.approx(16.0)
    assert line["model_tflops"] == pytest.approx(2 * 3e9 / 1e12)
    assert line["mfu"] == pytest.approx(2 * 3e9 / 1e10)
    assert line["data_wait"] == pytest.approx(0.2)


def test_a_pause_does_not_count(clock):
    counter = Meter(2, 1, 1, None)
    clock.now += 1.0
    counter.add(1, step(1), 0.0)
    clock.now += 60.0
    counter.pause(60.0)
    clock.now += 1.0
    counter.add(2, step(1), 0.0)
    line = counter.flush()[-1][2]
    assert line["steps_per_second"] == pytest.approx(1.0)
    assert "mfu" not in line  # the chip's peak is not known


def test_a_step_is_looked_at_only_when_later_ones_are_under_way(clock):
    counter, arrived = Meter(1, 1, 1, None), []
    for at in range(1, 6):
        arrived.append([step for step, _, _ in counter.add(at, step(0), 0.0)])
    assert arrived == [[]] * LAG + [[i] for i in range(1, 6 - LAG)]
    assert [at for at, _, _ in counter.flush()] == [4, 5]
    assert counter.flush() == []


def test_the_first_line_after_resuming_inside_an_interval_is_of_those_steps(clock):
    arrived = fed(Meter(100, 8, 1, None), clock, 99, [5, 7])
    assert arrived[-1][2]["loss"] == 6


def test_a_skipped_step_does_not_hide_the_loss_of_the_others(clock):
    line = fed(Meter(3, 1, 1, None), clock, 1, [1, math.nan, 3])[-1][2]
    assert line["loss"] == 2
    line = fed(Meter(1, 1, 1, None), clock, 1, [math.inf])[0][2]
    assert "loss" not in line  # nothing to say


def test_metrics_arrive_on_the_host_as_they_were(clock):
    counter = Meter(1, 1, 1, None)
    counter.add(1, step(1, bad=jnp.int32(7), skipped=jnp.array([3, 2])), 0.0)
    ((_, metrics, _),) = counter.flush()
    assert int(metrics["bad"]) == 7 and metrics["skipped"].tolist() == [3, 2]
