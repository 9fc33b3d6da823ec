"""Makes a checkpoint of int8 or 4-bit weights: python quantize.py runs/digits digits-w8

What sample.py takes by --weights; a fourth of the bytes on disk and in memory, or less.
Weights are read a stack of layers at a time, so the floats are never all in memory.
"""

import sit_jax.opening

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, so none held

from configs import published
from sit_jax import command, hosts
from sit_jax.adapters import quantizing
from sit_jax.adapters.quantized import SKIP, WORDS, storing
from sit_jax.config import to_json
from sit_jax.convert import conversion
from sit_jax.convert.given import Given, add_untold
from sit_jax.errors import UserError
from sit_jax.files import atomic_write, require_free, require_space
from sit_jax.manifest import weights_hash
from sit_jax.parallel import chips


def main():
    parser = command.parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", metavar="SOURCE", help="workdir, checkpoint, .pt ... or a name")
    add("target", metavar="TARGET", help="directory; written whole or not at all")
    add("--form", default="w8", metavar="WORD", help=WORDS)
    add("--skip", default=SKIP, metavar="REGEX", help="weights that stay floats")
    add("--no-ema", action="store_true", help="the weights themselves, not their mean")
    add_untold(add)
    add("--overwrite", action="store_true")
    args, overrides = command.parse(parser)
    if overrides:
        raise UserError(f"{overrides[0]}: the config is that of the weights")
    storing(args.form, args.skip)
    with hosts.making(args.target):
        return quantize(args)


def quantize(args):
    """-> exit code, after args.target is written."""
    target = require_free(args.target, args.overwrite)
    how = {"family": args.family, "heads": args.heads, "base": published}
    opened = Given(args.source, **how).open()
    config, item = opened.config, "params" if args.no_ema else "ema"
    if "quantized" in opened.meta:
        form = opened.meta["quantized"]["form"]
        raise UserError(f"{args.source} is {form} already; start from its floats")
    whole = sum(4 * leaf.size for leaf in opened.shapes().values())
    require_space(target, whole)  # generous: at most this
    params, rows = quantizing.converted(
        opened.leaves(item), args.form, args.skip, total=len(opened.shapes())
    )
    meta = {"config": to_json(config), "step": 0, "from": str(args.source)}
    meta["from_item"] = item
    with atomic_write(target) as name:
        quantizing.save(name, 0, params, meta, args.form, args.skip)
    _report(rows, params, target)
    return 0


def _report(rows, params, target):
    told = [("weight", "bytes", "now", "relative error")]
    for path, before, after, error in rows:
        told.append(
            (path, f"{before:,}", f"{after:,}", f"{error:.2e}" if error else "")
        )
    before, after = (sum(row[i] for row in rows) for i in (1, 2))
    told.append(("all", f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
    conversion.columns(told)
    print(f"{weights_hash(params)}  as sample.py's")
    print(f"peak memory {(chips.peak_memory() or 0) / 1e9:.2f} GB", target, sep="\n")


if __name__ == "__main__":
    command.script(main)
