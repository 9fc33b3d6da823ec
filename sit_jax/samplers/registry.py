"""Names on the command line, of samplers and of their choices; a config names objects.

They are the originals' where those had one: torchdiffeq's methods, SiT's forms of
diffusion and last steps.
"""

import difflib

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

SAMPLERS = {
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
SAMPLER_FLAGS = {
    "--steps": ("steps", None),
    "--respacing": ("steps", lambda word: parse_respacing(word)),
    "--atol": ("atol", None),
    "--rtol": ("rtol", None),
    "--step-control": ("control", CONTROLS),
    "--reverse": ("reverse", None),
    "--diffusion-form": ("diffusion", DIFFUSION_FORMS),
    "--diffusion-norm": ("norm", None),
    "--last-step": ("last_step", LAST_STEPS),
    "--last-step-size": ("last", None),
    "--eta": ("eta", None),
    "--trajectory": ("frames", None),
}


def configure_sampler(config, name=None, choices=(), counted=None):
    """Sets config.sampler to the named one, and what {flag: word} say of it.

    Flags whose word is None or False are not meant. counted: a number of steps as the
    originals count, who give an ODE the points of its grid.
    """
    if name is not None:
        config.sampler = look_up("--sampler", name, SAMPLERS)()
    choices = dict(choices)
    if counted is not None:
        points = config.sampler.make in (FixedStepODE, Adams)
        choices["--steps"] = counted - 1 if points else counted
    for flag, word in choices.items():
        if word is None or word is False:
            continue
        field, table = SAMPLER_FLAGS[flag]
        chains = (SAMPLERS[name]().make for name in ("ddpm", "ddim"))
        astray = flag == "--respacing" and config.sampler.make not in chains
        if field not in config.sampler or astray:
            raise UserError(_misplaced(flag, word, field, config.sampler))
        if isinstance(table, dict):
            word = look_up(flag, word, table)
        elif table is not None:
            word = table(word)
        with config.sampler.ignore_type():
            config.sampler[field] = word


def look_up(flag, word, table):
    """table[word]; an unknown word is refused with the known ones."""
    if word not in table:
        near = difflib.get_close_matches(word, table, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{flag} {word!r} is unknown{hint}; there are {_list(table)}")
    return table[word]


def parse_respacing(word):
    """A word such as 250, 10,15,20 or ddim25 -> a spacing of schedules.kept_steps."""
    if word.startswith("ddim") and word[4:].isdecimal():
        return spec(DDIMSpacing, steps=int(word[4:]))
    parts = word.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(
            f"--respacing {word!r}: a number (250), sections (10,15,20) or ddim25"
        )
    numbers = tuple(int(part) for part in parts)
    return numbers if len(numbers) > 1 else numbers[0]


def _misplaced(flag, word, field, sampler):
    fits = [name for name, make in SAMPLERS.items() if field in make()]
    said = flag if word is True else f"{flag} {word}"
    if flag == "--respacing":
        fits = ["ddpm", "ddim"]
    now = _name_of(sampler)
    return f"{said}: {now} has no such setting; --sampler {_list(fits)} does"


def _name_of(sampler):
    """What a spec is called on the command line, or by its class."""
    chief = lambda node: [node.make, node.get("method"), node.get("implicit")]
    solver = lambda node: node.get("solver") and node.solver.make
    same = lambda a, b: chief(a) == chief(b) and solver(a) == solver(b)
    found = (name for name, make in SAMPLERS.items() if same(make(), sampler))
    return next((f"--sampler {name}" for name in found), sampler.make.__name__)


def _list(names):
    return ", ".join(names)
