"""What a device could do at best, and how much of its memory was used."""

import jax

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


def peak_flops(device=None):
    """FLOP/s of one device at its bfloat16 peak, or None where that is not known."""
    kind = (device or jax.devices()[0]).device_kind
    return next((peak * 1e12 for part, peak in PEAKS if part in kind), None)


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
