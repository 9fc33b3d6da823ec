"""The numbers of an optimizer, and of its learning rate's schedule, in their ranges."""

import jax
import numpy as np

from sit_jax.config import build
from sit_jax.errors import UserError

RATE = (0, 100)
OPTIMIZER = {  # by optax's names, as those below
    "learning_rate": RATE,
    "weight_decay": RATE,
    "b1": (0, 1),
    "b2": (0, 1),
    "b3": (0, 1),
    "eps": (0, 1),
    "eps_root": (0, 1),
}
SCHEDULE = {name: RATE for name in ("init_value", "peak_value", "end_value", "value")}
SCHEDULE |= {"exponent": (0, 100), "power": (0, 100)}
LEAST = {  # of optax's counts of steps; of none it makes a constant rate, silently
    "warmup_steps": 0,
    "transition_begin": 0,
    "transition_steps": 1,
    "decay_steps": 1,
}
SAMPLES = 512  # steps at which a schedule is looked at


def check(config):
    """Refuses an optimizer's numbers, and rates of its schedule, that train nothing."""
    _ranges("optimizer", config.optimizer, OPTIMIZER)
    schedule = _given(config.optimizer, "learning_rate")
    if hasattr(schedule, "keys"):
        where = "optimizer.learning_rate"
        _ranges(where, schedule, SCHEDULE)
        if getattr(schedule.make, "__module__", "").startswith("optax."):
            _counts(where, schedule)
        _course(where, build(schedule), config.steps)


def _ranges(where, node, ranges):
    for name, (least, most) in ranges.items():
        value = _given(node, name)
        if isinstance(value, int | float) and not least <= value < most:
            raise UserError(
                f"{where}.{name} is {value}; it must be in [{least:g}, {most:g})"
            )


def _counts(where, schedule):
    for name, least in LEAST.items():
        value = _given(schedule, name)
        if value is None:
            continue
        if not (
            isinstance(value, int | float)
            and value >= least
            and float(value).is_integer()
        ):
            raise UserError(
                f"{where}.{name} is {value!r}; a whole number, at least {least}"
            )
    warmup, whole = (_given(schedule, name) for name in ("warmup_steps", "decay_steps"))
    if None not in (warmup, whole) and whole <= warmup:
        raise UserError(
            f"{where}.decay_steps is {whole}, which counts the warmup: it must be "
            f"more than warmup_steps, {warmup}"
        )


def _course(where, schedule, steps):
    """Refuses a rate out of range at any of some steps from the first to the last."""
    at = np.unique(np.linspace(0, steps - 1, SAMPLES).astype(np.int32))
    least, most = RATE
    rates = np.asarray(jax.jit(jax.vmap(schedule))(at))
    wrong = ~((rates > least - 1e-9) & (rates < most))  # float32 may round below 0
    if wrong.any():
        step, rate = at[wrong][0], rates[wrong][0]
        raise UserError(
            f"{where} is {rate:g} at step {step}; it must be in [{least:g}, {most:g})"
        )


def _given(node, name):
    """A field's value; None also where there is none yet, of which build tells."""
    from ml_collections.config_dict import RequiredValueError

    try:
        value = node.get(name)
    except RequiredValueError:
        return None
    return value.item() if isinstance(value, np.number) else value
