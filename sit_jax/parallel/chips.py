"""What a device could do at best, and how much memory it has and was used."""

import jax

from sit_jax.errors import UserError

# Dense bfloat16 peak in TFLOP/s for each JAX device, by a part of its device_kind;
# makers' data sheets. The first match counts. A TPU v3 device is one core.
PEAKS = (
    ("B200", 2250.0),
    ("H200", 989.5),
    ("H100", 989.5),
    ("A100", 312.0),
    ("TPU7x", 1153.5),
    ("TPU v6", 918.0),
    ("TPU v5p", 459.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),
    ("TPU v4", 275.0),
    ("TPU v3", 61.5),
)

# Memory of one such device in GB (of a TPU in GiB); makers' data sheets.
MEMORY = (
    ("B200", 180),
    ("H200", 141),
    ("H100", 80),
    ("A100", 80),
    ("TPU7x", 96 * 1.024**3),
    ("TPU v6", 32 * 1.024**3),
    ("TPU v5p", 95 * 1.024**3),
    ("TPU v5 lite", 16 * 1.024**3),
    ("TPU v5e", 16 * 1.024**3),
    ("TPU v5", 95 * 1.024**3),
    ("TPU v4", 32 * 1.024**3),
    ("TPU v3", 16 * 1.024**3),
)
# Of a TPU: cycles a second, and what its wires to other chips take, in GB/s of all of
# them together in one direction; makers' data sheets (600 GB/s is 4,800 Gbit/s). The
# clocks agree with the peaks: in one cycle a v5p does 262,144 operations. That of a v6e
# is not published; it follows from 524,288, as 262,144 are fewer than its compiler
# reckons with (369,231 a cycle in a product of 8,192 x 8,192).
CLOCKS = (
    ("TPU v6", 1.75),
    ("TPU v5p", 1.75),
    ("TPU v5 lite", 1.5),
    ("TPU v5e", 1.5),
    ("TPU v5", 1.75),
    ("TPU v4", 1.05),
)
WIRES = (
    ("TPU v6", 400),
    ("TPU v5p", 600),
    ("TPU v5 lite", 200),
    ("TPU v5e", 200),
    ("TPU v5", 600),
    ("TPU v4", 300),
)
NAMES = {  # for the command line
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6",
    "tpu7x": "TPU7x",
    "A100": "A100",
    "H100": "H100",
    "H200": "H200",
    "B200": "B200",
}


def kind_named(name):
    """-> device_kind of a name of NAMES."""
    if name not in NAMES:
        raise UserError(f"no chip {name!r}; there are {', '.join(NAMES)}")
    return NAMES[name]


def peak_flops(device=None):
    """FLOP/s of one device at its bfloat16 peak, or None where that is not known."""
    return peak_of((device or jax.devices()[0]).device_kind)


def peak_of(kind):
    """The same for a device_kind."""
    return next((peak * 1e12 for part, peak in PEAKS if part in kind), None)


def memory_of(kind):
    """Bytes that a device of this kind has, or None where that is not known."""
    return next((size * 1e9 for part, size in MEMORY if part in kind), None)


def clock_of(kind):
    """Cycles a second of a TPU of this kind, or None where that is not known."""
    return next((clock * 1e9 for part, clock in CLOCKS if part in kind), None)


def wires_of(kind):
    """Bytes a second that a TPU of this kind sends to others, or None if unknown."""
    return next((size * 1e9 for part, size in WIRES if part in kind), None)


def peak_memory():
    """Most bytes in use so far on the first local device, or None where unknown.

    On a CPU it is the most this process has held, all simulated devices together.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _process_peak()
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def _process_peak():
    try:
        import resource
    except ImportError:  # not on this system
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
