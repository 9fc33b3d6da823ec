"""TPU slices that are not here: their devices, and programs compiled for them.

libtpu has the real TPU compiler and runs on any Linux machine. What it compiles cannot
be run here, but its memory, its collectives and its products are the real ones.
"""

import contextlib
import importlib.util
import os
import re

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sit_jax.errors import UserError

# The usual slices of each generation, as chips along each axis; others may compile too.
_FLAT = "2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split()
KNOWN = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
REMEDY = "pip install libtpu (150 MB) into this environment"
# A v4 chip is one device of two cores, as JAX has it on the chip itself.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# Else libtpu looks for the machine's own TPU, waits for a server that tells of it, and
# refuses a second process, which on a TPU would want the same chips.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def devices(name):
    """-> the devices of a slice like v5p:4x4x8, of n such slices by v5p:4x4x8*n."""
    slice_, _, count = name.partition("*")
    kind, _, shape = slice_.partition(":")
    if shape not in KNOWN.get(kind, ()) or not (count or "1").isdecimal():
        known = "; ".join(f"{k}:{', '.join(shapes)}" for k, shapes in KNOWN.items())
        raise UserError(f"no topology {name!r}; there are {known} (*2: two slices)")
    for variable, value in _ALONE.items():
        os.environ.setdefault(variable, value)
    options = _OPTIONS.get(kind, {})
    if count:
        options = {**options, "num_slices": int(count)}
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"a TPU's compiler is in libtpu, which is not here: {REMEDY}")
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_, **options
        )
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"topology {name}: {str(error).splitlines()[0]}") from error
    return found.devices


def host(name):
    """-> the devices of one host of a slice, and how many hosts the slice has.

    They are those of the smallest slice, since only a whole one can be compiled for.
    """
    each = devices(name)
    first = [device for device in each if device.process_index == 0]
    if len(first) == len(each):
        return each, 1
    kind = name.partition(":")[0]
    return devices(f"{kind}:{KNOWN[kind][0]}"), len(each) // len(first)


def available(device):
    """-> bytes of memory that the compiler gives programs on such a device.

    It says so where a program needs more, so it is asked for one that always does.
    """
    place = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**42,), "float32", sharding=place)
    with without_cache():
        try:
            jax.jit(lambda x: x + 1).lower(huge).compile()
        except jax.errors.JaxRuntimeError as error:
            if found := re.search(r"available HBM \(([\d.]+)([MGT])\)", str(error)):
                return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
            raise
    raise UserError(f"{device.device_kind}: its compiler tells no limit of memory")


def compiled(lowered, options=None):
    """-> the compiled program, or None if it needs more memory than there is."""
    with without_cache():
        try:
            return lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise


@contextlib.contextmanager
def without_cache():
    """A program for a TPU can be stored in the cache, but not be read without one."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
