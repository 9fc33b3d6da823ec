"""Names for samplers on the command line; a config names the object itself."""

from sit_jax.config import spec
from sit_jax.errors import UserError
from sit_jax.samplers.chain import Ancestral, Ddim
from sit_jax.samplers.ode import AdaptiveOde, Ode, euler, heun
from sit_jax.samplers.sde import Sde

SAMPLERS = {
    "euler": lambda: spec(Ode, method=euler),
    "heun": lambda: spec(Ode, method=heun),
    "dopri5": lambda: spec(AdaptiveOde),
    "euler-maruyama": lambda: spec(Sde),
    "ddpm": lambda: spec(Ancestral),
    "ddim": lambda: spec(Ddim),
}


def chosen(config, name=None, steps=None):
    """Sets config.sampler to the named one, and its number of steps."""
    if name is not None:
        if name not in SAMPLERS:
            raise UserError(f"no sampler {name!r}; there are {', '.join(SAMPLERS)}")
        config.sampler = SAMPLERS[name]()
    if steps is not None:
        if "steps" not in config.sampler:
            kind = config.sampler.make.__name__
            raise UserError(
                f"--steps {steps}: {kind} chooses its own steps; set "
                "--config.sampler.rtol, or take --sampler heun"
            )
        config.sampler.steps = steps
