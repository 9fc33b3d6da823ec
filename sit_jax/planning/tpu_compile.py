"""Programs compiled for TPU slices that are not here.

libtpu has the real TPU compiler and runs on any Linux machine. What it compiles cannot
be run here, but its memory and its collectives are the real ones, and the cycles are
the compiler's own estimate of each operation.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sit_jax.errors import UserError
from sit_jax.parallel import hardware

# The usual slices of each generation, as chips along each axis; others may compile too.
_FLAT = "2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split()
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
# A v4 chip is one device of two cores, as JAX has it on the chip itself.
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
# Else libtpu looks for the machine's own TPU, waits for a server that tells of it, and
# refuses a second process, which on a TPU would want the same chips.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class TPUProgram:
    """A compiled program; sizes are bytes of one device.

    Attributes:
      available: what the compiler gives to programs.
      arguments: weights, optimizer, EMA and batch.
      temporaries: all else that is alive at once.
      output: what of it is not in the memory of a donated argument.
      code: the program itself.
      seconds: that compiling took.
      text: XLA's HLO.
    """

    available: int
    arguments: int
    temporaries: int
    output: int
    code: int
    seconds: float
    text: str

    @property
    def free(self) -> int:
        """Bytes that are left."""
        used = self.arguments + self.temporaries + self.output + self.code
        return self.available - used


class Collective(NamedTuple):
    """A collective operation of a program."""

    kind: str
    bytes: int  # of its result on one device
    times: int  # in one run of the program
    name: str  # of the operation that it is for


def get_tpu_devices(name: str) -> list[Any]:
    """Returns the devices of a slice like v5p:4x4x8, of n such slices by v5p:4x4x8*n.

    Raises:
      UserError: the slice is unknown, or libtpu is not installed.
    """
    slice_, _, count = name.partition("*")
    kind, _, shape = slice_.partition(":")
    if shape not in SLICES.get(kind, ()) or not (count or "1").isdecimal():
        known = "; ".join(f"{k}:{', '.join(shapes)}" for k, shapes in SLICES.items())
        raise UserError(f"no topology {name!r}; there are {known} (*2: two slices)")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options = _OPTIONS.get(kind, {}) | ({"num_slices": int(count)} if count else {})
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "a TPU's compiler is in libtpu, which is not here: pip install libtpu "
            "(150 MB) into this environment"
        )
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_, **options
        )
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"topology {name}: {str(error).splitlines()[0]}") from error
    return topology.devices


def get_host_devices(name: str) -> tuple[list[Any], int]:
    """Returns the devices of one host of a slice, and how many hosts the slice has.

    They are those of the smallest slice, since only a whole one can be compiled for.
    """
    devices = get_tpu_devices(name)
    first = [device for device in devices if device.process_index == 0]
    if len(first) == len(devices):
        return devices, 1
    kind = name.partition(":")[0]
    return get_tpu_devices(f"{kind}:{SLICES[kind][0]}"), len(devices) // len(first)


@functools.cache
def get_available_memory(device: Any) -> int:
    """Returns the bytes that the compiler gives to programs on such a device.

    It says so where a program needs more, so it is asked for one that always does.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**42,), "float32", sharding=sharding)
    with without_compilation_cache():
        try:
            jax.jit(lambda x: x + 1).lower(huge).compile()
        except jax.errors.JaxRuntimeError as error:
            if limit := re.search(r"available HBM \(([\d.]+)([MGT])\)", str(error)):
                return int(float(limit[1]) * 1024 ** ("KMGT".index(limit[2]) + 1))
            raise
    raise UserError(f"{device.device_kind}: its compiler tells no limit of memory")


def compile_for_tpu(lowered: Any, device: Any) -> TPUProgram | None:
    """Compiles a lowered program; returns None if it does not fit in memory."""
    start = time.perf_counter()
    with without_compilation_cache():
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
    memory = program.memory_analysis()
    return TPUProgram(
        available=get_available_memory(device),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        seconds=time.perf_counter() - start,
        text=program.as_text(),
    )


def find_largest_batch(
    compile_batch: Callable[[int], TPUProgram | None],
    batch: int,
    program: TPUProgram | None,
    step: int,
    attempts: int = 3,
) -> int:
    """Returns the largest batch, in multiples of `step`, seen to fit, or 0.

    Temporaries are taken to grow in proportion to the batch. Near the limit the
    compiler also trades time for memory, so a larger batch might fit.

    Args:
      compile_batch: compiles the program of a batch; None where it does not fit.
      batch, program: the first that was tried.
      step: what batches are multiples of.
      attempts: how many more are tried.
    """
    largest, too_large = (batch, math.inf) if program else (0, batch)
    for _ in range(attempts):
        guess = (largest + too_large) / 2
        if program:
            growth = 1 + program.free / max(program.temporaries, 1)
            guess = min(guess, largest * growth)
        guess = int(guess) // step * step
        if guess <= largest:
            break
        if fitting := compile_batch(guess):
            largest, program = guess, fitting
        else:
            too_large = guess
    return largest


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Turns the cache off: a TPU's program can be stored there, but not be read."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def describe_program(
    program: TPUProgram, flops: float | None = None, kind: str = ""
) -> Iterator[str]:
    """Yields lines about a program's memory, collectives and cycles.

    Args:
      program: the program.
      flops: of one chip in a run, for the share of its peak.
      kind: the chip's device_kind.
    """
    gb = lambda size: f"{size / 1e9:.3f}"
    yield (
        f"compiled in {program.seconds:.0f} s; GB a chip: arguments "
        f"{gb(program.arguments)}, temporaries {gb(program.temporaries)}, output "
        f"beside arguments {gb(program.output)}, code {gb(program.code)}, free "
        f"{gb(program.free)} of {gb(program.available)}"
    )
    yield f"{'collectives':20} {'written':>7} {'run':>8} {'GB a chip':>10}"
    for name, row in sum_by_kind(read_collectives(program.text)).items():
        yield f"{name:20} {row[0]:7} {row[1]:8} {gb(row[2]):>10}"
    cycles, chip = count_cycles(program.text), hardware.chip_of(kind)
    if flops and cycles and chip.clock and chip.peak_flops:
        seconds = cycles / chip.clock
        yield (
            f"the compiler reckons {cycles / 1e6:.1f} million cycles, "
            f"{1e3 * seconds:.1f} ms at {chip.clock / 1e9:g} GHz, "
            f"{flops / chip.peak_flops / seconds:.0%} MFU, without waiting for other "
            "chips"
        )


# --- reading HLO, XLA's text of a program ---

KINDS = "all-gather all-reduce reduce-scatter all-to-all collective-permute".split()
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([0-9,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    type: str
    op: str
    rest: str  # operands and attributes


def read_collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, as often as they are written down.

    Each channel counts once: the compiler repeats a collective that it spreads over
    several steps of computation, and of these the rarest counts.
    """
    by_channel: dict[Any, Collective] = {}
    for computation, times, line in iterate_instructions(text):
        kind = line.op.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=(\d+)", line.rest)
            key = channel[1] if channel else (computation, line.name)
            name = re.search(r'op_name="(.*?)"', line.rest)
            made = Collective(kind, _result_bytes(line), times, name[1] if name else "")
            rival = by_channel.get(key, made)
            by_channel[key] = min(rival, made, key=lambda c: c.times)
    return list(by_channel.values())


def sum_by_kind(
    collectives: list[Collective],
) -> dict[str, tuple[int, int, int]]:
    """Returns {kind: (collectives written down, times run, bytes in all)}."""
    table = {}
    for kind in KINDS:
        if same := [c for c in collectives if c.kind == kind]:
            size = sum(c.times * c.bytes for c in same)
            table[kind] = (len(same), sum(c.times for c in same), size)
    return table


def count_cycles(text: str) -> int:
    """Returns the cycles of a run by the compiler's estimates, or 0 without any.

    One operation after the other, loops counted, without waiting for other chips.
    """
    return sum(
        times * int(estimate[1])
        for _, times, line in iterate_instructions(text)
        if (estimate := re.search(r'"estimated_cycles":"(\d+)"', line.rest))
    )


def iterate_instructions(text: str) -> Iterator[tuple[str, int, Instruction]]:
    """Yields each instruction that runs, with its computation and how often it runs."""
    program = parse_computations(text)
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in program.get(name, ()):
            trips = _trip_count(program, line) if line.op == "while" else 1
            for called in _CALLED.findall(line.rest):
                visit(called, count * trips)
            for branches in _BRANCHES.findall(line.rest):
                for called in re.findall(r"[\w.\-]+", branches):
                    visit(called, count)

    visit("", 1)
    for name, lines in program.items():
        if times[name]:
            yield from ((name, times[name], line) for line in lines)


def parse_computations(text: str) -> dict[str, list[Instruction]]:
    """Returns {computation: instructions}; the entry has the name ''."""
    program: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    for row in text.splitlines():
        if head := _HEAD.match(row):
            lines = program.setdefault("" if head[1] else head[2], [])
        elif line := _LINE.match(row):
            lines.append(Instruction(*line.groups()))
    return program


def _trip_count(program: dict[str, list[Instruction]], loop: Instruction) -> int:
    """Returns how often a loop runs; 1 where nothing tells it.

    The compiler notes it, or it is the only constant of the loop's condition.
    """
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    lines = program.get(condition[1], ()) if condition else ()
    numbers = [line.rest.partition(")")[0] for line in lines if line.op == "constant"]
    counts = [int(number) for number in numbers if number.isdecimal()]
    return counts[0] if len(counts) == 1 else 1


def _result_bytes(line: Instruction) -> int:
    """Returns bytes of the results; a -start may hold operands and numbers too."""
    arrays = _ARRAY.findall(line.type)
    if line.op.endswith("-start") and not line.op.startswith("all-reduce"):
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    return sum(array_bytes(*array) for array in arrays)


def array_bytes(dtype: str, dims: str) -> int:
    """Returns the bytes of an array that HLO writes as dtype[dims]."""
    bits = int(re.search(r"\d+|$", dtype)[0] or 8)  # pred has none
    return max(1, bits // 8) * math.prod(int(n) for n in dims.split(",") if n)
