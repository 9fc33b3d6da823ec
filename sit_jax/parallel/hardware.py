"""What a device can do at best, and how much memory it has and has used.

Figures are the makers' data sheets'.
"""

import dataclasses

import jax

from sit_jax.errors import UserError

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device; a figure is None where it is not known.

    Attributes:
        kinds: parts of the device_kind that such a device reports.
        peak_flops: dense bfloat16 FLOP/s.
        memory: bytes.
        clock: cycles a second.
        link_bandwidth: bytes a second to other chips, all links in one direction.
    """

    kinds: tuple[str, ...]
    peak_flops: float | None = None
    memory: float | None = None
    clock: float | None = None
    link_bandwidth: float | None = None


# By the name that --chip takes; the first whose kind is a part of device_kind counts.
# The clocks agree with the peaks: in one cycle a v5p does 262,144 operations. That of a
# v6e is not published. It follows from 524,288 operations, as 262,144 are fewer than
# its compiler reckons with (369,231 a cycle in a product of 8,192 x 8,192). A TPU v3
# device is one core.
CHIPS = {
    "B200": Chip(("B200",), 2250e12, 180e9),
    "H200": Chip(("H200",), 989.5e12, 141e9),
    "H100": Chip(("H100",), 989.5e12, 80e9),
    "A100": Chip(("A100",), 312e12, 80e9),
    "tpu7x": Chip(("TPU7x",), 1153.5e12, 96 * GIB),
    "v6e": Chip(("TPU v6",), 918e12, 32 * GIB, 1.75e9, 400e9),
    "v5e": Chip(("TPU v5e", "TPU v5 lite"), 197e12, 16 * GIB, 1.5e9, 200e9),
    "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95 * GIB, 1.75e9, 600e9),
    "v4": Chip(("TPU v4",), 275e12, 32 * GIB, 1.05e9, 300e9),
    "v3": Chip(("TPU v3",), 61.5e12, 16 * GIB),
}


def device_kind(name: str) -> str:
    """Returns the device_kind of a chip that the command line names.

    Raises:
        UserError: there is no such chip.
    """
    if name not in CHIPS:
        raise UserError(f"no chip {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name].kinds[0]


def chip_of(kind: str) -> Chip:
    """Returns what is known of a device_kind."""
    for chip in CHIPS.values():
        if any(part in kind for part in chip.kinds):
            return chip
    return Chip(())


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Returns FLOP/s of one device at its bfloat16 peak, None where unknown."""
    return chip_of((device or jax.devices()[0]).device_kind).peak_flops


def peak_memory() -> int | None:
    """Returns the most bytes in use so far on the first local device, None if unknown.

    On a CPU it is the most this process has held, all simulated devices together.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
