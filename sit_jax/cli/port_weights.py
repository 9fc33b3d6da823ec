"""Turns PyTorch weights into a checkpoint directory, or a checkpoint into PyTorch's.

python port_weights.py SiT-XL-2-256.pt sit-xl2 --family sit
python port_weights.py runs/digits digits.pt
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, so none held

import argparse
import time
from collections.abc import Mapping
from types import ModuleType

import jax

from sit_jax import checkpoint
from sit_jax import config as configs
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert import parity, peft, pretrained, tensor_files
from sit_jax.convert.adapters import port_adapter
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.diffusers import is_diffusers_folder
from sit_jax.convert.export import (
    CheckpointExport,
    compare_tensors,
    flatten_parts,
    format_columns,
)
from sit_jax.convert.model_card import LAYOUTS, model_card, write_model_folder
from sit_jax.convert.open import add_torch_flags, family_of
from sit_jax.convert.state_dict import StateDictSpec, read_torch_file
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
from sit_jax.parallel import hardware, multihost
from sit_jax.ranges import AtLeast


@entry_point
def main() -> int:
    """Runs port_weights.py with the arguments of the process; returns the exit code."""
    args, overrides = parse_args(_parser())
    begin = time.perf_counter()
    target = args.target = require_free(args.target, args.overwrite)
    if pretrained.find(args.source):
        args.family = family_of(args.source, args.family)
        args.source = pretrained.fetch(args.source)
    is_adapter = bool(args.adapter or args.base or peft.is_adapter_folder(args.source))
    is_torch = not is_adapter and _is_torch_source(args)
    _refuse_meaningless(args, overrides, is_adapter, is_torch)
    original = args.reference and parity.import_original(args.reference)
    args.figures = {path: read_json(path) for path in args.figures or ()}
    if is_adapter or is_torch:
        _require_replaceable(target)
    with multihost.lock_output(target):
        if is_adapter:
            kind, base, step = args.adapter, args.base, args.step
            lines = port_adapter(args.source, target, kind=kind, base=base, step=step)
            print(*lines, sep="\n")
        elif is_torch:
            to_checkpoint(args, overrides, original)
        elif args.to:
            to_folder(args)
        else:
            to_torch_file(args, original)
    memory = (hardware.peak_memory() or 0) / 1e9
    print(f"{time.perf_counter() - begin:.1f} s, peak memory {memory:.2f} GB")
    return 0


def _parser():
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", metavar="SOURCE", help="x.pt, diffusers folder, workdir, name ...")
    add("target", metavar="TARGET", help="the other kind; written whole or not at all")
    add_torch_flags(add)
    add("--config", metavar="FILE", help="of the run; refused if the weights differ")
    step_help = "of a checkpoint; default: the newest"
    add("--step", type=AtLeast(0), metavar="N", help=step_help)
    add("--to", choices=LAYOUTS, help="a folder, instead of a .pt")
    add("--figures", metavar="FILE", nargs="+", help="of evaluate.py, for the card")
    add("--reference", metavar="DIR", help="clone of SiT or DiT to compare with")
    add("--adapter", choices=("peft", "diffusers", "merged"), help="what LoRA becomes")
    add("--base", metavar="DIR", help="workdir or checkpoint that LoRA files belong to")
    add("--overwrite", action="store_true")
    return parser


def _is_torch_source(args):
    """Tells from the two paths whether torch weights become a checkpoint."""
    source, target, to = as_path(args.source), as_path(args.target), args.to
    if not source.exists():
        raise UserError(
            f"nothing at {source}; name a torch file, a workdir or a checkpoint"
        )
    is_torch = not source.is_dir() or is_diffusers_folder(source)
    is_file = target.suffix in tensor_files.SUFFIXES
    if to and (is_torch or is_file):
        raise UserError(f"--to {to} writes a folder, of a checkpoint: not {target}")
    if is_torch and is_file:
        raise UserError(f"{source} and {target} are both torch files; name a directory")
    if not (is_torch or is_file or to):
        raise UserError(
            f"{source} and {target} are both directories; name a "
            f"{', '.join(tensor_files.SUFFIXES)}, or --to {' or '.join(LAYOUTS)}"
        )
    return is_torch


def _refuse_meaningless(args, overrides, is_adapter, is_torch):
    """Refuses flags that mean nothing on the way that is taken."""
    if overrides and not args.config:
        raise UserError(f"{overrides[0]} changes a --config, and none is given")
    source, reasons = args.source, {}
    if is_torch or (is_adapter and peft.is_adapter_folder(source)):
        reasons["step"] = f"is for a checkpoint, not {source}"
    if is_torch:
        reasons["figures"] = "goes into the card of an export"
    else:
        own = f"is for a torch file: {source} brings its own config"
        reasons |= dict.fromkeys(("family", "heads", "config"), own)
    if is_adapter:
        network = "is for a network, not for LoRA"
        reasons |= dict.fromkeys(("to", "figures", "reference"), network)
    elif args.to:
        reasons["reference"] = "is for a .pt, not for --to"
    for name, reason in reasons.items():
        if getattr(args, name) is not None:
            raise UserError(f"--{name} {reason}")


def _require_replaceable(target):
    """Refuses a folder that holds anything but steps of a checkpoint and adapters."""
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    others = names - {peft.CONFIG, peft.WEIGHTS, peft.DIFFUSERS}
    if others := sorted(name for name in others if not name.isdecimal()):
        raise UserError(f"{target} is not overwritten: it also holds {others[0]}")


def to_checkpoint(
    args: argparse.Namespace, overrides: list[str], original: ModuleType | None = None
) -> None:
    """Converts a torch file or diffusers folder into a checkpoint directory."""
    target = args.target
    config = args.config and configs.load(args.config)
    if config:
        configs.override(config, overrides)
    source = pretrained.fetch(args.source)
    weights = open_torch_file(
        source, family=args.family, heads=args.heads, config=config
    )
    print(f"converting {args.source}", flush=True)
    items, meta = weights.items()
    require_space(target, sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
    file = weights.file
    meta["sha256"] = sha256(file.path)
    ema_hash = weights_hash(items["ema"])
    with atomic_write(target) as name:
        print(f"writing {target}", flush=True)
        checkpoint.save_step(name, meta["step"], meta, **items)
        del items
        print("reading it back", flush=True)
        export, parts = CheckpointExport(name, meta["step"]), file.parts()
        hashes = compare_tensors(export.tensors(*parts), parts)
        _print_parity(original, export, file.ema)
    _print_network(export.spec, file.ema.dtypes)
    if file.ignored:
        print(f"left out: {', '.join(file.ignored)}")
    _print_parts(parts, hashes)
    print(f"{meta['sha256']}  {file.path}, {file.layout}")
    print(f"{ema_hash}  ema, as sample.py's", f"{target}/{meta['step']}", sep="\n")


def to_torch_file(args: argparse.Namespace, original: ModuleType | None = None) -> None:
    """Converts a step of a checkpoint into a torch file, or the files of MDT's run."""
    target = args.target
    export = _open_checkpoint(args)
    files, parts, left_out = export.torch_files(target)
    card = f"{target.name}.md"
    paths = [
        require_free(target.with_name(name), args.overwrite) for name in [*files, card]
    ]
    arrays = [array for part in parts.values() for array in part.values()]
    require_space(target, sum(array.nbytes for array in arrays))
    with atomic_writes(paths) as folder:
        for name, content in files.items():
            print(f"writing {target.with_name(name)}", flush=True)
            tensor_files.write(folder / name, content)
        print("reading it back", flush=True)
        file = read_torch_file(folder / target.name)
        written = file.parts()
        hashes = compare_tensors(
            flatten_parts(parts), {part: written[part] for part in parts}
        )
        _print_parity(original, export, file.ema)
        shas = {name: sha256(folder / name) for name in files}
        key = '["ema"]' if "opt" in files[target.name] else ""
        text = model_card(export, target.name, shas, figures=args.figures, key=key)
        (folder / card).write_text(text)
    _print_network(export.spec, ["float32"])
    if left_out:
        print(f"written: {left_out}")
    _print_parts(parts, hashes)
    for name, sha in shas.items():
        print(f"{sha}  {target.with_name(name)}")


def to_folder(args: argparse.Namespace) -> None:
    """Converts a step of a checkpoint into a folder for the Hugging Face Hub."""
    target = args.target
    export = _open_checkpoint(args)
    shapes = export.spec.param_shapes.values()
    require_space(target, sum(4 * leaf.size for leaf in shapes))
    with atomic_write(target) as folder:
        print(f"writing {target}", flush=True)
        gap = write_model_folder(folder, export, args.to, target.name, args.figures)
    _print_network(export.spec, ["float32"])
    print(*filter(None, [gap]), target, sep="\n")


def _open_checkpoint(args):
    directory, step = checkpoint.find_step(args.source)
    step = step if args.step is None else args.step
    print(f"converting {directory}/{step}", flush=True)
    return CheckpointExport(directory, step)


def _print_network(spec: StateDictSpec, dtypes: list[str]) -> None:
    """Prints the network and a row for each stack of layers."""
    model, shape = spec.model, " x ".join(map(str, spec.shape))
    print(
        f"{type(model).__name__}: depth {model.depth}, width {model.width}, heads "
        f"{model.heads}, patch {model.patch}, MLP ratio {model.mlp_ratio:g}, "
        f"{model.classes} classes, null label {model.null_label}, learn_sigma "
        f"{model.learn_sigma}, data {shape}, {', '.join(dtypes)}"
    )
    rows = [("torch", "tensors", "shape", "ours", "shape")]
    for torch_name, path, _ in spec.rules:
        shape = spec.param_shapes[path].shape
        count = shape[0] if "*" in torch_name else 1
        one = spec.trained[torch_name.replace("*", "0")]
        rows.append((torch_name, count, one, path, shape))
    for name, table in spec.constants.items():
        rows.append((name, 1, table.shape, "(constant, spare)", ""))
    print(format_columns(rows))


def _print_parts(parts: Mapping[str, Mapping], hashes: Mapping[str, str]) -> None:
    """Prints what was compared with what was read back, and is the same."""
    rows = [("part", "tensors", "sha256, the same on both sides")]
    rows += [(part, len(parts[part]), sha) for part, sha in hashes.items()]
    print(format_columns(rows))


def _print_parity(original, export, state):
    """Prints how far our network is from the original's with the same weights."""
    if original is None:
        return
    model, shape = export.spec.model, export.spec.shape
    differences = parity.compare_stages(original, model, shape, state, export.ema())
    print(f"relative L2 difference to the network of {original.__file__}:")
    rows = [(stage, f"{value:.1e}") for stage, value in differences.items()]
    print(format_columns(rows))


if __name__ == "__main__":
    main()
