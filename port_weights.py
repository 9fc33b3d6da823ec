"""Turns PyTorch weights into a checkpoint directory, or a checkpoint into PyTorch's.

python port_weights.py SiT-XL-2-256.pt sit-xl2 --family sit
python port_weights.py runs/digits digits.pt
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, so none held

import time

import jax

from sit_jax import checkpoint
from sit_jax import config as configs
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert import (
    adapter_exchange,
    conversion,
    directions,
    mdt_files,
    model_folder,
    reference,
    releases,
    tensor_files,
)
from sit_jax.convert.card import card
from sit_jax.convert.comparison import compare
from sit_jax.convert.exchange import Stored, open_torch
from sit_jax.convert.given import add_untold
from sit_jax.convert.weights import family_of
from sit_jax.errors import UserError
from sit_jax.files import (
    as_path,
    atomic_write,
    atomic_writes,
    read_json,
    require_free,
    require_space,
    sha256,
)
from sit_jax.manifest import weights_hash
from sit_jax.models.mdt import MDT
from sit_jax.parallel import hardware, multihost
from sit_jax.ranges import AtLeast
from sit_jax.recipes import published


@entry_point
def main():
    args, overrides = parse_args(_parser())
    begun = time.perf_counter()
    _fetch(args)
    is_adapter = directions.is_adapter(args)
    inwards = not is_adapter and directions.inwards(args.source, args.target, args.to)
    directions.refuse_others(args, overrides, inwards)
    if is_adapter:
        directions.refuse_beside_adapters(args)
    _figures(args)  # refused before anything is read
    original = args.reference and reference.original(args.reference)
    with multihost.lock_output(args.target):
        if is_adapter:
            how = (args.step, args.adapter, args.base, args.unmerge, args.overwrite)
            print(*adapter_exchange.port(args.source, args.target, *how), sep="\n")
        elif inwards:
            to_checkpoint(args, overrides, original)
        elif args.to:
            to_folder(args)
        else:
            to_torch(args, original)
    memory = (hardware.peak_memory() or 0) / 1e9
    print(f"{time.perf_counter() - begun:.1f} s, peak memory {memory:.2f} GB")
    return 0


def _parser():
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", metavar="SOURCE", help="x.pt, diffusers folder, workdir, name ...")
    add("target", metavar="TARGET", help="the other kind; written whole or not at all")
    add_untold(add)
    add("--config", metavar="FILE", help="of the run; refused if the weights differ")
    add(
        "--step",
        type=AtLeast(0),
        metavar="N",
        help="of a checkpoint; default: the newest",
    )
    add("--to", choices=model_folder.LAYOUTS, help="a folder, instead of a .pt")
    add("--figures", metavar="FILE", nargs="+", help="of evaluate.py, for the card")
    add("--reference", metavar="DIR", help="clone of SiT or DiT to compare with")
    add("--adapter", choices=("peft", "diffusers", "merged"), help="what LoRA becomes")
    add("--base", metavar="DIR", help="workdir or checkpoint that LoRA files belong to")
    add("--unmerge", metavar="ADAPTER", help="take it out of merged weights again")
    add("--overwrite", action="store_true")
    return parser


def _fetch(args):
    """A published name becomes its file, which is loaded if it is not there."""
    if releases.find(args.source) is None:
        return
    require_free(args.target, args.overwrite)
    args.family = family_of(args.source, args.family)
    args.source = releases.fetch(args.source)


def to_checkpoint(args, overrides, original=None):
    target = require_free(args.target, args.overwrite)
    if target.is_dir() and (odd := _not_steps(target)):
        raise UserError(f"{target} is not overwritten: it holds {odd}, no checkpoint")
    config = args.config and configs.load(args.config)
    if config:
        configs.override(config, overrides)
    source = releases.fetch(args.source)
    weights = open_torch(source, published, args.family, args.heads, config)
    print(f"converting {args.source}", flush=True)
    items, meta = weights.items()
    require_space(target, sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
    meta["sha256"] = sha256(weights.file.path)
    ema = weights_hash(items["ema"])
    with atomic_write(target) as name:
        print(f"writing {target}", flush=True)
        saved = checkpoint.Checkpoints(name, items=items)
        saved.save(meta["step"], meta, **items)
        del items
        saved.close()
        print("reading it back", flush=True)
        stored = Stored(name, meta["step"])
        parts = weights.file.parts()
        found = compare(stored.tensors(*parts), parts)
        _require_equal(found)
        conversion.compare_networks(original, stored, weights.file.ema)
    file = weights.file
    conversion.describe(stored, file.ema.dtypes)
    if file.ignored:
        print(f"left out: {', '.join(file.ignored)}")
    conversion.summary(found, (target, f"{file.path}, {file.layout}"))
    print(f"{meta['sha256']}  {file.path}", f"{ema}  ema, as sample.py's", sep="\n")
    print(f"{target}/{meta['step']}")


def to_torch(args, original=None):
    target = require_free(args.target, args.overwrite)
    stored = _stored(args)
    files, parts, left_out = _contents(stored, target)
    note = f"{target.name}.md"
    names = [*files, note]
    paths = [require_free(target.with_name(n), args.overwrite) for n in names]
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    require_space(target, sum(tensor.nbytes for tensor in tensors))
    with atomic_writes(paths) as folder:
        for name, content in files.items():
            print(f"writing {target.with_name(name)}", flush=True)
            tensor_files.write(folder / name, content)
        print("reading it back", flush=True)
        written = mdt_files.read(folder / target.name)
        theirs = {part: written.parts()[part] for part in parts}
        each = ((p, name, array) for p in parts for name, array in parts[p].items())
        found = compare(each, theirs)
        _require_equal(found)
        conversion.compare_networks(original, stored, written.ema)
        shas = {name: sha256(folder / name) for name in files}
        text = card(stored, target.name, "torch", shas, _figures(args))
        (folder / note).write_text(text)
    conversion.describe(stored, ["float32"])
    if left_out:
        print(f"written: {left_out}")
    conversion.summary(found, (f"{stored.directory}/{stored.step}", target))
    for name, sha in shas.items():
        print(f"{sha}  {target.with_name(name)}")


def to_folder(args):
    target = require_free(args.target, args.overwrite)
    stored = _stored(args)
    shapes = stored.released.params.values()
    require_space(target, sum(4 * leaf.size for leaf in shapes))
    with atomic_write(target) as folder:
        print(f"writing {target}", flush=True)
        found, lines = model_folder.write(
            folder, stored, args.to, target.name, _figures(args)
        )
        _require_equal(found)
    conversion.describe(stored, ["float32"])
    conversion.summary(found, (f"{stored.directory}/{stored.step}", target))
    print(*lines, target, sep="\n")


def _stored(args):
    """The step of the checkpoint that is asked for."""
    directory, step = checkpoint.find_step(args.source)
    step = step if args.step is None else args.step
    print(f"converting {directory}/{step}", flush=True)
    return Stored(directory, step)


def _contents(stored, target):
    """-> {file name: content}, the parts in them, and what is left out, if anything."""
    why = stored.no_moments
    if target.suffix == ".safetensors":
        why = "a .safetensors holds one state dict"
    elif stored.step and isinstance(stored.released.model, MDT):
        name = mdt_files.named(stored.step)
        if mdt_files.number_of(target) is not None:
            if target.name != name:
                raise UserError(f"{target}: MDT's file of this step is called {name}")
            files, parts = stored.run_of_mdt()
            return files, parts, why and f"all but the optimizer, for {why}"
        why = f"only a {name} has the run's other files beside it"
    content, parts = stored.content(bare=why is not None)
    return {target.name: content}, parts, why and f"the EMA alone, for {why}"


def _figures(args):
    """Paths of evaluate.py's JSON files, which are there and can be read."""
    paths = [as_path(path) for path in args.figures or ()]
    for path in paths:
        if not path.is_file():
            raise UserError(f"--figures: no file at {path}")
        read_json(path)
    return paths


def _not_steps(directory):
    names = (child.name for child in directory.iterdir())
    return ", ".join(name for name in names if not name.isdecimal())


def _require_equal(found):
    for part, each in found.items():
        if each.left != each.right:
            raise UserError(f"{part} came back different by up to {each.difference}")


if __name__ == "__main__":
    main()
