"""Names of samplers and of their choices on the command line; a config names objects.

They are the originals' where those had one: torchdiffeq's methods, SiT's forms of
diffusion and last steps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import diffrax

from sit_jax.config import spec
from sit_jax.diffusion.schedules import DDIMSpacing
from sit_jax.errors import UserError
from sit_jax.samplers import fixed_ode, sde
from sit_jax.samplers.adaptive_ode import (
    AdaptiveODE,
    Fehlberg2,
    batch_error_control,
    per_sample_control,
)
from sit_jax.samplers.ddpm import DDIM, DDPM
from sit_jax.samplers.fixed_ode import Adams, FixedStepODE
from sit_jax.samplers.sde import SDE
from sit_jax.samplers.torchdiffeq import torchdiffeq_control

SAMPLERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: spec(FixedStepODE, method=fixed_ode.euler),
    "midpoint": lambda: spec(FixedStepODE, method=fixed_ode.midpoint),
    "heun": lambda: spec(FixedStepODE, method=fixed_ode.heun),
    "heun2": lambda: spec(FixedStepODE, method=fixed_ode.heun),
    "heun3": lambda: spec(FixedStepODE, method=fixed_ode.heun3),
    "rk4": lambda: spec(FixedStepODE, method=fixed_ode.rk4),
    "explicit_adams": lambda: spec(Adams),
    "implicit_adams": lambda: spec(Adams, implicit=True),
    "dopri5": lambda: spec(AdaptiveODE),
    "dopri8": lambda: spec(AdaptiveODE, solver=spec(diffrax.Dopri8)),
    "bosh3": lambda: spec(AdaptiveODE, solver=spec(diffrax.Bosh3)),
    "fehlberg2": lambda: spec(AdaptiveODE, solver=spec(Fehlberg2)),
    "adaptive_heun": lambda: spec(AdaptiveODE, solver=spec(diffrax.Heun)),
    "euler-maruyama": lambda: spec(SDE),
    "sde-heun": lambda: spec(SDE, method=sde.heun),
    "ddpm": lambda: spec(DDPM),
    "ddim": lambda: spec(DDIM),
}
CONTROLS = {
    "global": batch_error_control,
    "sample": per_sample_control,
    "torchdiffeq": torchdiffeq_control,
}
DIFFUSION_FORMS = {
    "sigma": sde.diffusion_sigma,
    "SBDM": sde.diffusion_sbdm,
    "constant": sde.diffusion_constant,
    "linear": sde.diffusion_linear,
    "decreasing": sde.diffusion_decreasing,
    "increasing-decreasing": sde.diffusion_increasing_decreasing,
}
LAST_STEPS = {
    "Mean": sde.last_step_mean,
    "Tweedie": sde.last_step_tweedie,
    "Euler": sde.last_step_euler,
    "None": sde.last_step_none,
}
# flag: field of the sampler, and the table that turns its word into an object
SAMPLER_FLAGS: dict[str, tuple[str, dict | None]] = {
    "--steps": ("steps", None),
    "--respacing": ("steps", None),
    "--atol": ("atol", None),
    "--rtol": ("rtol", None),
    "--step-control": ("control", CONTROLS),
    "--reverse": ("reverse", None),
    "--diffusion-form": ("diffusion", DIFFUSION_FORMS),
    "--diffusion-norm": ("norm", None),
    "--last-step": ("last_step", LAST_STEPS),
    "--last-step-size": ("last", None),
    "--eta": ("eta", None),
    "--trajectory": ("trajectory_length", None),
}


def configure_sampler(
    config: Any,
    name: str | None = None,
    choices: Mapping[str, Any] | None = None,
    counted: int | None = None,
) -> None:
    """Sets config.sampler to the named one, and its fields by command-line flags.

    Args:
      config: changed in place.
      name: of SAMPLERS; None keeps the config's sampler.
      choices: {flag: word}; flags whose word is None or False are not meant.
      counted: a number of steps as the originals count, who give an ODE the points of
        its grid.

    Raises:
      UserError: a word is unknown, or the sampler has no such field.
    """
    if name is not None:
        config.sampler = look_up("--sampler", name, SAMPLERS)()
    choices = dict(choices or {})
    if counted is not None:
        counts_points = config.sampler.make in (FixedStepODE, Adams)
        choices["--steps"] = counted - 1 if counts_points else counted
    for flag, word in choices.items():
        if word is None or word is False:
            continue
        field, table = SAMPLER_FLAGS[flag]
        if not _accepts(config.sampler, flag):
            names = [name for name, make in SAMPLERS.items() if _accepts(make(), flag)]
            raise UserError(
                f"{flag} {word}: {config.sampler.make.__name__} has no such setting; "
                f"--sampler {', '.join(names)} does"
            )
        if table is not None:
            word = look_up(flag, word, table)
        elif flag == "--respacing":
            word = parse_respacing(word)
        with config.sampler.ignore_type():
            config.sampler[field] = word


def look_up(flag: str, word: str, table: Mapping[str, Any]) -> Any:
    """Returns table[word]; refuses an unknown word, naming the known ones."""
    if word not in table:
        raise UserError(f"{flag} {word!r} is unknown; there are {', '.join(table)}")
    return table[word]


def _accepts(sampler: Any, flag: str) -> bool:
    """Returns whether a flag sets something of a sampler's spec."""
    if flag == "--respacing":
        return sampler.make in (DDPM, DDIM)
    return SAMPLER_FLAGS[flag][0] in sampler


def parse_respacing(word: str) -> Any:
    """Returns the spacing of a word such as 250, 10,15,20 or ddim25."""
    if word.startswith("ddim") and word[4:].isdecimal():
        return spec(DDIMSpacing, steps=int(word[4:]))
    sections = word.split(",")
    if not all(section.strip().isdecimal() for section in sections):
        raise UserError(
            f"--respacing {word!r}: a number (250), sections (10,15,20) or ddim25"
        )
    numbers = tuple(int(section) for section in sections)
    return numbers if len(numbers) > 1 else numbers[0]
