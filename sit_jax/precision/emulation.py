"""What a TPU or a GPU would have computed, on a machine that has none.

A TPU multiplies float32 arrays in one bfloat16 pass by default, a GPU since Ampere in
TF32: both round the operands to fewer bits of mantissa and add the products up in
float32. For one pass through a DiT that is a relative difference of about 5e-3 or 7e-4,
where float32 itself has 6e-7; it is the first suspect when the same weights score
differently on the two.

Not emulated: the order of summation; a TPU's products of a matrix with one vector,
which it computes in float32 (jax#16349); its exp, tanh and the like; a GPU that cuts
off the surplus bits, which are rounded here, to even.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives
from jax.lax import Precision

from sit_jax.errors import UserError

# Bits of mantissa, the implicit one counted, that are left of an operand by default:
# those of bfloat16 and of TF32.
EMULATED = {"tpu-default": 8, "gpu-tf32": 11}

PRODUCTS = (primitives.dot_general_p, primitives.conv_general_dilated_p)
# These bring their own derivatives, whose products would escape; their bodies stay.
RULED = (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)


def emulated_bits(name: str) -> int:
    """Returns the bits of mantissa of an emulated platform."""
    if name not in EMULATED:
        raise UserError(f"no emulation of {name!r}; there are {', '.join(EMULATED)}")
    return EMULATED[name]


def emulate(fn: Callable, mantissa_bits: int) -> Callable:
    """Returns fn, with the operands of every dot and convolution rounded.

    Only float32 operands are rounded, and their products are added up in float32.
    Loops, branches, jit, remat and shard_map inside fn are reached, and fn may be
    anywhere inside them. fn is a network rather than a sampler: a dot that asks for
    float32 of its own, as diffrax's do, is rounded with the others.

    A platform rounds the operands of a derivative's products too. emulate(grad(f), 8)
    does; grad(emulate(f, 8)) rounds what comes out of them instead of what goes in.

    Args:
      fn: a function of arrays.
      mantissa_bits: 2..24, the implicit one counted.
    """
    if not 2 <= mantissa_bits <= 24 or mantissa_bits != int(mantissa_bits):
        raise UserError(f"mantissa_bits={mantissa_bits}: a whole number from 2 to 24")

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        traced, shape = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        program = core.jaxpr_as_fun(_ProgramRounding(int(mantissa_bits)).closed(traced))
        out = program(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


class _ProgramRounding:
    """Rewrites jaxprs: the same variables and equations, with roundings in between.

    Nothing is traced again, so mesh axes, effects and constants stay what they are, and
    a program that is called twice stays one.
    """

    def __init__(self, bits: int) -> None:
        self._params = {"exponent_bits": 8, "mantissa_bits": bits - 1}
        self._rewritten: dict[Any, Any] = {}

    def closed(self, program: Any) -> Any:
        """Returns the rounded form of a closed jaxpr."""
        return core.ClosedJaxpr(self._open(program.jaxpr), program.consts)

    def _open(self, jaxpr: Any) -> Any:
        if jaxpr not in self._rewritten:
            equations = [new for old in jaxpr.eqns for new in self._equations(old)]
            self._rewritten[jaxpr] = jaxpr.replace(eqns=equations)
        return self._rewritten[jaxpr]

    def _equations(self, equation: Any) -> list:
        if equation.primitive in PRODUCTS:
            return self._product(equation)
        params = {name: self._param(value) for name, value in equation.params.items()}
        if equation.primitive in RULED:
            call = {"call_jaxpr": params["call_jaxpr"]}
            return [equation.replace(primitive=primitives.closed_call_p, params=call)]
        return [equation.replace(params=params)]

    def _param(self, value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return self.closed(value)
        if isinstance(value, core.Jaxpr):
            return self._open(value)
        if isinstance(value, tuple) and any(map(_is_program, value)):
            items = map(self._param, value)
            return value._make(items) if hasattr(value, "_make") else tuple(items)
        return value

    def _product(self, equation: Any) -> list:
        operands = [self._round(operand, equation) for operand in equation.invars]
        # an accelerator must not round them any further
        params = equation.params | {"precision": (Precision.HIGHEST, Precision.HIGHEST)}
        product = equation.replace(invars=[x for x, _ in operands], params=params)
        return [added for _, roundings in operands for added in roundings] + [product]

    def _round(self, operand: Any, like: Any) -> tuple[Any, list]:
        """Returns an operand's rounded value, and the equations that make it."""
        if operand.aval.dtype != "float32":
            return operand, []
        out, primitive = core.Var(operand.aval), primitives.reduce_precision_p
        place = (core.no_effects, like.source_info, like.ctx)
        added = core.new_jaxpr_eqn([operand], [out], primitive, self._params, *place)
        return out, [added]


def _is_program(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
