"""Rates that train nothing are refused, also where only the schedule's course is."""

import optax
import pytest
import small

from sit_jax import rates
from sit_jax.config import spec
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
