"""Turns PyTorch weights into a checkpoint directory, or a checkpoint into PyTorch's.

python port_weights.py SiT-XL-2-256.pt sit-xl2 --family sit
python port_weights.py runs/digits digits.pt
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, so none held

import importlib
import time
from pathlib import Path

import jax

from sit_jax import checkpoint, chips, command, mdt_files, reference, tensor_files
from sit_jax import config as configs
from sit_jax.comparison import compare, file_sha
from sit_jax.drafts import draft, drafts, require_free, require_space
from sit_jax.errors import UserError
from sit_jax.exchange import Stored, open_torch
from sit_jax.manifest import weights_hash
from sit_jax.models.mdt import MDT
from sit_jax.torch_config import FAMILIES


def main():
    parser = command.parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", metavar="SOURCE", help="x.pt, x.safetensors, workdir or checkpoint")
    add("target", metavar="TARGET", help="the other kind; written whole or not at all")
    add("--family", choices=FAMILIES, help="of weights that do not tell")
    add("--heads", type=int, metavar="N", help="where the size is not a published one")
    add("--config", metavar="FILE", help="of the run; refused if the weights differ")
    add("--step", type=int, metavar="N", help="of a checkpoint; default: the newest")
    add("--reference", metavar="DIR", help="clone of SiT or DiT to compare with")
    add("--overwrite", action="store_true")
    args, overrides = command.parse(parser)
    begun = time.perf_counter()
    inwards = _inwards(args.source, args.target)
    _refuse_others(args, overrides, inwards)
    original = args.reference and reference.original(args.reference)
    if inwards:
        to_checkpoint(args, overrides, original)
    else:
        to_torch(args, original)
    memory = (chips.peak_memory() or 0) / 1e9
    print(f"{time.perf_counter() - begun:.1f} s, peak memory {memory:.2f} GB")
    return 0


def to_checkpoint(args, overrides, original=None):
    target = require_free(args.target, args.overwrite)
    if target.is_dir() and (odd := _not_steps(target)):
        raise UserError(f"{target} is not overwritten: it holds {odd}, no checkpoint")
    config = args.config and configs.load(args.config)
    if config:
        configs.override(config, overrides)
    weights = open_torch(args.source, published, args.family, args.heads, config)
    print(f"converting {args.source}", flush=True)
    items, meta = weights.items()
    require_space(target, sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
    meta["sha256"] = file_sha(weights.file.path)
    ema = weights_hash(items["ema"])
    with draft(target) as name:
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
        _compare_networks(original, stored, weights.file.ema)
    file = weights.file
    _describe(stored, file.ema.dtypes)
    if file.ignored:
        print(f"left out: {', '.join(file.ignored)}")
    _summary(found, (target, f"{file.path}, {file.layout}"))
    print(f"{meta['sha256']}  {file.path}", f"{ema}  ema, as sample.py's", sep="\n")
    print(f"{target}/{meta['step']}")


def to_torch(args, original=None):
    target = require_free(args.target, args.overwrite)
    directory, step = checkpoint.find(args.source)
    if args.step is not None:
        step = args.step
    stored = Stored(directory, step)
    print(f"converting {directory}/{step}", flush=True)
    files, parts, left_out = _contents(stored, target)
    paths = [require_free(target.with_name(n), args.overwrite) for n in files]
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    require_space(target, sum(tensor.nbytes for tensor in tensors))
    with drafts(paths) as folder:
        for name, content in files.items():
            print(f"writing {target.with_name(name)}", flush=True)
            tensor_files.write(folder / name, content)
        print("reading it back", flush=True)
        written = mdt_files.read(folder / target.name)
        theirs = {part: written.parts()[part] for part in parts}
        each = ((p, name, array) for p in parts for name, array in parts[p].items())
        found = compare(each, theirs)
        _require_equal(found)
        _compare_networks(original, stored, written.ema)
        hashes = [(file_sha(folder / path.name), path) for path in paths]
    _describe(stored, ["float32"])
    if left_out:
        print(f"written: {left_out}")
    _summary(found, (f"{directory}/{step}", target))
    for sha, path in hashes:
        print(f"{sha}  {path}")


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


def published(family):
    """The config of the published run that a family's weights are taken for."""
    return importlib.import_module(f"configs.{family}_xl2").get_config()


def _inwards(source, target):
    """Whether torch weights become a checkpoint, by the kinds of the two paths."""
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.exists():
        raise UserError(f"nothing at {source}")
    inwards, ends = not source.is_dir(), ", ".join(tensor_files.KINDS)
    if inwards and target.suffix in tensor_files.KINDS:
        raise UserError(f"{source} and {target} are both torch files; name a directory")
    if not inwards and target.suffix not in tensor_files.KINDS:
        raise UserError(f"{source} and {target} are both directories; name a {ends}")
    return inwards


def _refuse_others(args, overrides, inwards):
    """Flags of the other direction."""
    if overrides and not args.config:
        raise UserError(f"{overrides[0]} changes a --config, and none is given")
    if inwards and args.step is not None:
        raise UserError(f"--step {args.step} is for a checkpoint, not {args.source}")
    for name in () if inwards else ("family", "heads", "config"):
        if (value := getattr(args, name)) is not None:
            raise UserError(f"--{name} {value}: {args.source} brings its own config")


def _not_steps(directory):
    names = (child.name for child in directory.iterdir())
    return ", ".join(name for name in names if not name.isdecimal())


def _require_equal(found):
    for part, each in found.items():
        if each.left != each.right:
            raise UserError(f"{part} came back different by up to {each.difference}")


def _describe(stored, dtypes):
    """Prints the network and a row for each stack of layers."""
    model, side = stored.released.model, stored.config.shape
    print(
        f"{type(model).__name__}: depth {model.depth}, width {model.width}, heads "
        f"{model.heads}, patch {model.patch}, MLP ratio {model.mlp_ratio:g}, "
        f"{model.classes} classes, null label {model.null_label}, learn_sigma "
        f"{model.learn_sigma}, data {' x '.join(map(str, side))}, {', '.join(dtypes)}"
    )
    rows = [("torch", "tensors", "shape", "ours", "shape")]
    trained, params = stored.released.trained, stored.released.params
    for torch_name, path, _ in stored.released.rules:
        stacked, shape = "*" in torch_name, params[path].shape
        one = trained[torch_name.replace("*", "0")]
        rows.append((torch_name, shape[0] if stacked else 1, one, path, shape))
    for name, table in stored.released.constants.items():
        rows.append((name, 1, table.shape, "(constant, spare)", ""))
    _table(rows)


def _summary(found, sides):
    rows = [("part", "tensors", "largest difference", "sha256 of the tensors")]
    for part, each in found.items():
        rows.append((part, each.tensors, f"{each.difference:g}", each.left))
        rows.append(("", "", "", each.right))
    _table(rows)
    print(f"upper of each two: {sides[0]}", f"lower: {sides[1]}", sep="\n")


def _compare_networks(original, stored, state):
    if original is None:
        return
    model, shape = stored.released.model, stored.released.shape
    found = reference.differences(original, model, shape, state, stored.ema())
    print(f"relative L2 difference to the network of {original.__file__}:")
    _table([(stage, f"{value:.1e}") for stage, value in found])


def _table(rows):
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    command.script(main)
