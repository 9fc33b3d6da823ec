"""What a TPU's compiler makes of a program for a slice: memory, traffic, products."""

import dataclasses
import tempfile
import time
from pathlib import Path

import jax

from sit_jax.parallel import hardware
from sit_jax.planning import hlo, topology


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Of one device, in bytes, but for the seconds that compiling took."""

    available: int
    arguments: int
    temporaries: int
    output: int  # what of it is not in the memory of a donated argument
    code: int
    seconds: float
    text: str

    @property
    def free(self):
        used = self.arguments + self.temporaries + self.output + self.code
        return self.available - used


def compile_for(lowered, device):
    """-> Compiled, or None if it needs more memory than a device has."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = topology.compiled(lowered, options)
        if program is None:
            return None
        text = _text(program, Path(folder))
    found = program.memory_analysis()
    return Compiled(
        available=topology.available(device),
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        output=found.output_size_in_bytes - found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        seconds=time.perf_counter() - begun,
        text=text,
    )


def _text(program, folder):
    """Its HLO; where this jaxlib cannot read it, libtpu's own print of it, if any."""
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:
        return printed(folder)


def printed(folder):
    """-> the largest program that libtpu printed into a folder once it was done."""
    found = list(folder.glob("*.after_codegen.txt"))
    largest = max(found, key=lambda path: path.stat().st_size, default=None)
    return largest.read_text() if largest else ""


def lines(made, flops=None, kind=None):
    """A Compiled in words. flops: of a chip in a run, if its pace is to be told."""
    gb = lambda n: f"{n / 1e9:.3f}"
    yield (
        f"compiled in {made.seconds:.0f} s; GB a chip: arguments {gb(made.arguments)}, "
        f"temporaries {gb(made.temporaries)}, program {gb(made.code)}, "
        f"free {gb(made.free)} of {gb(made.available)}"
    )
    if not made.text:
        yield "this jaxlib cannot read the program: no more is known of it"
        return
    yield f"{hlo.aliased(made.text)} arrays take the memory of donated ones"
    found = hlo.collectives(made.text)
    yield f"{'collectives':20} written      run  GB a chip  largest MB"
    for name, (written, run, size) in hlo.by_kind(found).items():
        largest = max(each.bytes for each in found if each.kind == name)
        size, largest = size / 1e9, largest / 1e6
        yield f"{name:20} {written:7} {run:8} {size:10.3f} {largest:11.2f}"
    yield from _pace(made, flops, kind) if flops else ()
    yield "products, and how many are written down:"
    for each, count in hlo.products(made.text).most_common():
        told = f"{each.left} x {each.right} -> {each.out}"
        yield f"  {told:24} {each.precision:8} {count:4}"


def _pace(made, flops, kind):
    """What the compiler's own reckoning of cycles comes to, and the wires at best."""
    count, chip = hlo.cycles(made.text), hardware.chip_of(kind)
    clock, peak, wires = chip.clock, chip.peak_flops, chip.link_bandwidth
    if not (count and clock and wires):
        return
    seconds, sent = count / clock, hlo.sent(hlo.collectives(made.text))
    yield (
        f"the compiler reckons {count / 1e6:.1f} million cycles, "
        f"{1e3 * seconds:.1f} ms at {clock / 1e9:g} GHz, {flops / peak / seconds:.0%} "
        "MFU, without waiting for other chips; all collectives take "
        f"{1e3 * sent / wires:.1f} ms if every wire is used"
    )
    yield "where they go, in per cent, and of these in products:"
    for layer, parts in hlo.by_layer(made.text).items():
        if parts[0] >= 0.01 * count:  # less is told of no layer
            total, products = (f"{100 * part / count:5.1f}" for part in parts)
            yield f"  {layer or 'outside the network':28} {total} {products}"


HEADER = (
    "| topology | batch | arguments GB | temporaries GB | free GB | "
    + " | ".join(f"{kind} GB" for kind in hlo.KINDS)
    + " | compiled s |"
)


def row(name, batch, made):
    """A Compiled as a row of the table in docs/tpu.md, below HEADER; GB a chip."""
    kinds = hlo.by_kind(hlo.collectives(made.text))
    sent = [kinds.get(kind, (0, 0, 0))[2] for kind in hlo.KINDS]
    sizes = (made.arguments, made.temporaries, made.free)
    told = [f"{n / 1e9:.2f}" for n in (*sizes, *(sent if made.text else ()))]
    cells = (name, f"{batch:,}", *told, *["?"] * (0 if made.text else len(sent)))
    return f"| {' | '.join(cells)} | {made.seconds:.0f} |"


def largest_batch(lower, device, known, step, attempts=3, say=lambda line: None):
    """-> the largest batch, in multiples of `step`, that was seen to fit, or 0.

    say(line) is told of each that is tried. lower(batch) -> a lowered program; known:
    {batch: Compiled or None}, to which what is tried is added. Temporaries are taken to
    grow in proportion to the batch; the compiler also trades time for memory near the
    limit, so a larger one might fit.
    """
    for _ in range(attempts):
        guess = _guess(known, step)
        if guess in known or guess < step:
            break
        known[guess] = made = compile_for(lower(guess), device)
        fits = f"{made.free / 1e9:.2f} GB a chip free" if made else "does not fit"
        say(f"batch {guess}: {fits}")
    return max((batch for batch, made in known.items() if made), default=0)


def _guess(known, step):
    """Where a straight line through what fits meets the limit; below what does not."""
    fits = sorted(batch for batch, made in known.items() if made)
    above = min((batch for batch, made in known.items() if not made), default=None)
    if not fits:
        return above // 2 // step * step
    high = fits[-1]
    if len(fits) == 1:
        slope = known[high].temporaries / high
    else:
        low = fits[-2]
        slope = (known[low].free - known[high].free) / (high - low)
    guess = (high + int(known[high].free / max(slope, 1))) // step * step
    return (
        guess if above is None else min(guess, (fits[-1] + above) // 2 // step * step)
    )
