"""What each kind of network costs."""

from collections.abc import Callable
from typing import NamedTuple

from sit_jax.models import dit, mdt, mdt_cost


class Kind(NamedTuple):
    macs: Callable  # (model, shape) -> multiply-adds of a forward pass over an image
    step_macs: Callable  # those of the passes of a training step


_DIT = Kind(dit.macs, dit.macs)
_MDT = Kind(mdt_cost.macs, mdt_cost.step_macs)
KINDS = {
    dit.SiT: _DIT,
    dit.DiT: _DIT,
    mdt.MDT: _MDT,
    mdt.MDTv2: _MDT,
}


def kind_of(network):
    """network: a class of KINDS, or one made from it."""
    return next(KINDS[each] for each in network.__mro__ if each in KINDS)
