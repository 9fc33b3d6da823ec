"""Strengths of guidance that change with time: functions of t [B], for guided()."""

import dataclasses
import math

import jax.numpy as jnp

from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PowerCosine:
    """From none at the noisiest step to `scale` at the cleanest, as MDT samples.

    1 + (scale - 1) (1 - cos(pi (1 - t / steps)^power)) / 2, where t is what the network
    is told: the step's number before respacing. The larger the power, the later it
    rises; near 0 it is `scale` all the way.
    """

    scale: float = 3.8
    power: float = 4.0
    steps: int = 1000

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise UserError(f"scale={self.scale} of PowerCosine must be finite")
        if not (self.power > 0 and math.isfinite(self.power)):
            raise UserError(f"power={self.power} of PowerCosine must be positive")
        if self.steps < 1:
            raise UserError(f"steps={self.steps} of PowerCosine: at least 1")

    def __call__(self, t):
        angle = jnp.pi * (1 - t / self.steps) ** self.power
        return 1 + (self.scale - 1) * (1 - jnp.cos(angle)) / 2
