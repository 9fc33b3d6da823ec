"""Rates that train nothing are refused, also where only the schedule's course is."""

import numpy as np
import optax
import pytest
import small

from sit_jax import rates
from sit_jax.config import build, spec
from sit_jax.errors import UserError


def config(rate):
    c = small.config(steps=100)
    with c.ignore_type():
        c.optimizer.learning_rate = rate
    return c


def growing(decay_rate):
    return spec(
        optax.exponential_decay,
        init_value=1e-3,
        transition_steps=10,
        decay_rate=decay_rate,
    )


def test_a_course_that_leaves_the_range_is_refused():
    with pytest.raises(UserError, match=r"learning_rate is 100.* at step 50; .*100\)"):
        rates.check(config(growing(10.0)))
    with pytest.raises(UserError, match="learning_rate is nan at step 1;"):
        rates.check(config(growing(float("nan"))))


@pytest.mark.parametrize(
    "rate",
    [
        growing(1.0),
        spec(optax.constant_schedule, value=1e-3),
        spec(
            optax.linear_schedule, init_value=1e-3, end_value=0.0, transition_steps=10
        ),
        spec(optax.cosine_decay_schedule, init_value=1e-3, decay_steps=50),
        spec(
            optax.warmup_cosine_decay_schedule,
            init_value=0.0,
            peak_value=1e-3,
            warmup_steps=0,
            decay_steps=50,
        ),
        0.0,
    ],
    ids="exponential constant linear cosine no-warmup number".split(),
)
def test_usual_courses_pass(rate):
    rates.check(config(rate))


def test_a_field_without_a_value_is_named():
    with pytest.raises(UserError, match="needs a value for its field 'end_value'"):
        rates.check(config(spec(optax.linear_schedule, init_value=1e-3)))


def test_an_optimizer_without_a_rate_is_left_to_build():
    c = small.config(steps=100)
    c.optimizer = spec(optax.adamw)
    rates.check(c)
    with pytest.raises(UserError, match="needs a value for its field 'learning_rate'"):
        build(c.optimizer)


@pytest.mark.parametrize("steps", [float("inf"), float("nan"), 10.5, np.int64(0)])
def test_a_count_that_is_none_is_refused(steps):
    rate = spec(optax.cosine_decay_schedule, init_value=1e-3, decay_steps=steps)
    with pytest.raises(UserError, match="decay_steps is .*; a whole number, at least"):
        rates.check(config(rate))


def test_numpys_numbers_count_as_pythons():
    rates.check(
        config(
            spec(
                optax.cosine_decay_schedule,
                init_value=np.float32(1e-3),
                decay_steps=np.int64(50),
            )
        )
    )
    c = config(1e-3)
    c.optimizer.weight_decay = np.float64(-1)
    with pytest.raises(UserError, match="optimizer.weight_decay is -1"):
        rates.check(c)


def own(warmup_steps, decay_steps):
    """Stable between a warmup and a decay that may be none."""
    return lambda step: 1e-3 * min(1, warmup_steps + decay_steps) + 0 * step


def test_optaxs_meaning_of_steps_is_not_asked_of_others():
    rates.check(config(spec(own, warmup_steps=10, decay_steps=0)))
