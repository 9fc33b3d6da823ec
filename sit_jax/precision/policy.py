"""How exactly products are computed: names with the same meaning on every platform.

Left alone, JAX multiplies float32 arrays in one bfloat16 pass on a TPU and in TF32 on a
GPU (jax#7010, jax#18934), and its names for better mean other things on other
platforms. A precision here has this meaning on each:

    exact  float32 products everywhere: 24 bits of mantissa
    fast   the quick way that a platform has for float32 arrays: 8 bits on a TPU (one
           bfloat16 pass), 11 on a GPU (TF32), 24 on a CPU, which has none
    bf16   the network itself computes in bfloat16, and sums in float32; what it keeps
           in float32 (time embedding, output) is as in exact

The names are those of jax.default_matmul_precision that reach dots and convolutions
alike. A named dot algorithm (F32_F32_F32, TF32_TF32_F32) says nothing to a convolution,
which stays at the platform's default, and a TPU compiles neither of these two; the
tests show both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from sit_jax.errors import UserError

Model = TypeVar("Model")


class MatmulPrecision(NamedTuple):
    """JAX's name on one platform, and the mantissa bits of an operand that it keeps.

    The implicit bit counts. TF32 is allowed and not forced: a GPU without it, or whose
    quickest convolution does not use it, keeps more.
    """

    jax_name: str
    min_bits: int
    max_bits: int


# HIGHEST; on a TPU that is six bfloat16 passes, which keep all bits
FLOAT32 = MatmulPrecision("highest", 24, 24)
# HIGH; XLA lets cuBLAS and cuDNN use TF32 up to it. On a TPU it would be three passes.
TF32 = MatmulPrecision("tensorfloat32", 11, 24)
# for dots by name, for convolutions as the TPU's default; the same to its compiler
ONE_PASS = MatmulPrecision("BF16_BF16_F32", 8, 8)
# bfloat16 operands are exact in one pass; HIGHEST is for the float32 ones beside them
HALF = MatmulPrecision("highest", 8, 8)
PLATFORMS = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "tpu": "tpu"}  # JAX's: ours


@dataclasses.dataclass(frozen=True)
class Precision:
    """A precision on all platforms.

    Attributes:
      name: exact, fast or bf16.
      dtype: what a model that has this field computes in.
      cpu, gpu, tpu: how products are computed there.
    """

    name: str
    dtype: str
    cpu: MatmulPrecision
    gpu: MatmulPrecision
    tpu: MatmulPrecision

    def matmul_precision(self, platform: str | None = None) -> MatmulPrecision:
        """Returns that of a platform of JAX's; by default this process's."""
        platform = platform or jax.default_backend()
        if platform not in PLATFORMS:
            raise UserError(
                f"precision {self.name!r} says nothing about the platform "
                f"{platform!r}; run on a cpu, gpu or tpu"
            )
        return {"cpu": self.cpu, "gpu": self.gpu, "tpu": self.tpu}[PLATFORMS[platform]]


EXACT = Precision("exact", "float32", cpu=FLOAT32, gpu=FLOAT32, tpu=FLOAT32)
FAST = Precision("fast", "float32", cpu=FLOAT32, gpu=TF32, tpu=ONE_PASS)
BF16 = Precision("bf16", "bfloat16", cpu=HALF, gpu=HALF, tpu=HALF)
PRECISIONS = {precision.name: precision for precision in (EXACT, FAST, BF16)}


def get_precision(name: str) -> Precision:
    """Returns the Precision of this name."""
    if name not in PRECISIONS:
        raise UserError(f"no precision {name!r}; there are {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def with_precision(
    precision: Precision, fn: Callable, platform: str | None = None
) -> Callable:
    """Returns fn, whose dots and convolutions say how exact they are.

    For eager use and in jit. They are marked when they are traced and hand it on to
    their derivatives, except to those of a jax.custom_vjp: for these wrap what takes
    the derivative. A layer that asks for a precision of its own keeps that.

    Args:
      precision: one of PRECISIONS.
      fn: a function of arrays.
      platform: where the program will run, if not on this process's default backend.
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        name = precision.matmul_precision(platform).jax_name
        with jax.default_matmul_precision(name):
            return fn(*args, **kwargs)

    return run


def with_compute_dtype(
    precision: Precision, model: Model, device: jax.Device | None = None
) -> Model:
    """Returns the model with its field `dtype` as the precision says.

    A model without this field is returned as it is, computing in float32. bf16 is
    refused for it, and on a GPU that cannot multiply bfloat16 (NVIDIA's before Ampere).
    """
    if precision.dtype == "bfloat16":
        _require_bfloat16(precision, device or jax.devices()[0])
    module: Any = model  # a dataclass, as all flax modules are
    if "dtype" in {field.name for field in dataclasses.fields(module)}:
        return dataclasses.replace(module, dtype=precision.dtype)
    if precision.dtype != "float32":
        raise UserError(
            f"precision {precision.name!r}: {type(model).__name__} has no field dtype "
            "and computes in float32; choose exact or fast"
        )
    return model


def _require_bfloat16(precision: Precision, device: Any) -> None:
    # JAX's devices have this on GPUs only: "8.0" of NVIDIA's, "gfx942" of AMD's
    capability = getattr(device, "compute_capability", "")
    if capability[:1].isdecimal() and float(capability) < 8:
        raise UserError(
            f"precision {precision.name!r}: {device.device_kind} cannot multiply "
            "bfloat16; choose exact or fast"
        )
