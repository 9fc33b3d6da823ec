"""Names on the command line, of samplers and of their choices; a config names objects.

They are the originals' where those had one: torchdiffeq's methods, SiT's forms of
diffusion and last steps.
"""

import difflib

import diffrax

from sit_jax.config import spec
from sit_jax.diffusion.schedules import DdimSpacing
from sit_jax.errors import UserError
from sit_jax.samplers import ode, sde
from sit_jax.samplers.adams import Adams
from sit_jax.samplers.adaptive import AdaptiveOde, Fehlberg2, over_batch, per_image
from sit_jax.samplers.chain import Ancestral, Ddim
from sit_jax.samplers.ode import Ode
from sit_jax.samplers.sde import Sde
from sit_jax.samplers.torchdiffeq import like_torchdiffeq

SAMPLERS = {
    "euler": lambda: spec(Ode, method=ode.euler),
    "midpoint": lambda: spec(Ode, method=ode.midpoint),
    "heun": lambda: spec(Ode, method=ode.heun),
    "heun2": lambda: spec(Ode, method=ode.heun),
    "heun3": lambda: spec(Ode, method=ode.heun3),
    "rk4": lambda: spec(Ode, method=ode.rk4),
    "explicit_adams": lambda: spec(Adams),
    "implicit_adams": lambda: spec(Adams, implicit=True),
    "dopri5": lambda: spec(AdaptiveOde),
    "dopri8": lambda: spec(AdaptiveOde, solver=spec(diffrax.Dopri8)),
    "bosh3": lambda: spec(AdaptiveOde, solver=spec(diffrax.Bosh3)),
    "fehlberg2": lambda: spec(AdaptiveOde, solver=spec(Fehlberg2)),
    "adaptive_heun": lambda: spec(AdaptiveOde, solver=spec(diffrax.Heun)),
    "euler-maruyama": lambda: spec(Sde),
    "sde-heun": lambda: spec(Sde, method=sde.heun),
    "ddpm": lambda: spec(Ancestral),
    "ddim": lambda: spec(Ddim),
}
CONTROLS = {
    "global": over_batch,
    "sample": per_image,
    "torchdiffeq": like_torchdiffeq,
}
FORMS = {
    "sigma": sde.by_sigma,
    "SBDM": sde.by_score,
    "constant": sde.constant,
    "linear": sde.falling,
    "decreasing": sde.decreasing,
    "increasing-decreasing": sde.increasing_decreasing,
}
LAST_STEPS = {
    "Mean": sde.mean,
    "Tweedie": sde.tweedie,
    "Euler": sde.euler,
    "None": sde.none,
}
# flag: field of the sampler, and the table that turns its word into an object
CHOICES = {
    "--steps": ("steps", None),
    "--respacing": ("steps", lambda word: spacing(word)),
    "--atol": ("atol", None),
    "--rtol": ("rtol", None),
    "--step-control": ("control", CONTROLS),
    "--reverse": ("reverse", None),
    "--diffusion-form": ("diffusion", FORMS),
    "--diffusion-norm": ("norm", None),
    "--last-step": ("last_step", LAST_STEPS),
    "--last-step-size": ("last", None),
    "--eta": ("eta", None),
    "--trajectory": ("frames", None),
}


def chosen(config, name=None, choices=(), counted=None):
    """Sets config.sampler to the named one, and what {flag: word} say of it.

    Flags whose word is None or False are not meant. counted: a number of steps as the
    originals count, who give an ODE the points of its grid.
    """
    if name is not None:
        config.sampler = named("--sampler", name, SAMPLERS)()
    choices = dict(choices)
    if counted is not None:
        points = config.sampler.make in (Ode, Adams)
        choices["--steps"] = counted - 1 if points else counted
    for flag, word in choices.items():
        if word is None or word is False:
            continue
        field, table = CHOICES[flag]
        chains = (SAMPLERS[name]().make for name in ("ddpm", "ddim"))
        astray = flag == "--respacing" and config.sampler.make not in chains
        if field not in config.sampler or astray:
            raise UserError(_misplaced(flag, word, field, config.sampler))
        if isinstance(table, dict):
            word = named(flag, word, table)
        elif table is not None:
            word = table(word)
        with config.sampler.ignore_type():
            config.sampler[field] = word


def named(flag, word, table):
    """table[word]; an unknown word is refused with the known ones."""
    if word not in table:
        near = difflib.get_close_matches(word, table, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{flag} {word!r} is unknown{hint}; there are {_list(table)}")
    return table[word]


def spacing(word):
    """A word such as 250, 10,15,20 or ddim25 -> a spacing of schedules.kept_steps."""
    if word.startswith("ddim") and word[4:].isdecimal():
        return spec(DdimSpacing, steps=int(word[4:]))
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
