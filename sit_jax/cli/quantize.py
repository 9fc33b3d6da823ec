"""Makes a checkpoint of int8 or 4-bit weights: quantize.py runs/digits digits-w8.

What sample.py takes by --weights; a fourth of the bytes on disk and in memory, or less.
Weights are read a stack of layers at a time, so the floats are never all in memory.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, so none held

from typing import Any

from sit_jax import checkpoint
from sit_jax.adapters.quantize import FORMS, SKIP, make_quantizer, quantize_stream
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.config import to_json
from sit_jax.convert.export import format_columns
from sit_jax.convert.open import WeightsRef, add_torch_flags
from sit_jax.errors import UserError
from sit_jax.files import atomic_write, require_free, require_space
from sit_jax.manifest import weights_hash
from sit_jax.parallel import hardware, multihost


@entry_point
def main() -> int:
    """Runs quantize.py with the arguments of the process; returns the exit code."""
    parser = make_parser(__doc__.splitlines()[0], has_config=False)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="workdir, checkpoint, .pt ... or a name")
    add("target", metavar="TARGET", help="directory; written whole or not at all")
    add("--form", default="w8", metavar="WORD", help=FORMS)
    add("--skip", default=SKIP, metavar="REGEX", help="weights that stay floats")
    add("--no-ema", action="store_true", help="the weights themselves, not their EMA")
    add_torch_flags(add)
    add("--overwrite", action="store_true")
    args, _ = parse_args(parser)
    make_quantizer(args.form, args.skip)  # refuses a wrong form before anything is read
    with multihost.lock_output(args.target):
        quantize(args)
    return 0


def quantize(args: Any) -> None:
    """Writes the quantized checkpoint that the arguments of main ask for."""
    target = require_free(args.target, args.overwrite)
    weights = WeightsRef(args.source, family=args.family, heads=args.heads).open()
    item = "params" if args.no_ema else "ema"
    if "quantized" in weights.meta:
        form = weights.meta["quantized"]["form"]
        raise UserError(f"{args.source} is {form} already; start from its floats")
    shapes = weights.shapes()
    require_space(target, sum(4 * leaf.size for leaf in shapes.values()))  # at most
    params, rows = quantize_stream(
        weights.leaves(item), args.form, args.skip, total=len(shapes)
    )
    meta = {"config": to_json(weights.config), "step": 0, "from": str(args.source)}
    meta["from_item"] = item
    with atomic_write(target) as name:
        save_quantized(name, 0, params, meta, form=args.form, skip=args.skip)
    _print_report(rows, params, target)


def save_quantized(
    directory: Any, step: int, params: dict, meta: dict, *, form: str, skip: str
) -> None:
    """Writes quantized parameters as a step of a checkpoint directory."""
    meta = {**meta, "quantized": {"form": form, "skip": skip}}
    checkpoint.save_step(directory, step, meta, ema=params)


def _print_report(rows, params, target):
    table = [("weight", "bytes", "now", "relative error")]
    for path, before, after, error in rows:
        shown_error = f"{error:.2e}" if error else ""
        table.append((path, f"{before:,}", f"{after:,}", shown_error))
    before, after = (sum(row[i] for row in rows) for i in (1, 2))
    table.append(("all", f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
    print(format_columns(table))
    print(f"{weights_hash(params)}  as sample.py's")
    print(f"peak memory {(hardware.peak_memory() or 0) / 1e9:.2f} GB", target, sep="\n")


if __name__ == "__main__":
    main()
