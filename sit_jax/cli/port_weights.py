"""Turns PyTorch weights into a checkpoint directory, or a checkpoint into PyTorch's.

python port_weights.py SiT-XL-2-256.pt sit-xl2 --family sit
python port_weights.py runs/digits digits.pt
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, so none held

import argparse
import time
from types import ModuleType

import jax

from sit_jax import checkpoint
from sit_jax import config as configs
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert import (
    diffusers,
    parity,
    peft,
    pretrained,
    tensor_files,
)
from sit_jax.convert.adapters import port_adapter
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.export import (
    CheckpointExport,
    compare_tensors,
    flatten_parts,
    format_columns,
)
from sit_jax.convert.model_card import LAYOUTS, model_card, write_model_folder
from sit_jax.convert.open import add_torch_flags, family_of
from sit_jax.convert.state_dict import read_torch_file
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
from sit_jax.recipes import published


@entry_point
def main() -> int:
    """Runs port_weights.py with the arguments of the process; returns the exit code."""
    args, overrides = parse_args(_parser())
    begin = time.perf_counter()
    if pretrained.find(args.source):
        require_free(args.target, args.overwrite)
        args.family = family_of(args.source, args.family)
        args.source = pretrained.fetch(args.source)
    is_adapter = bool(args.adapter or args.base)
    is_adapter = is_adapter or peft.is_adapter_folder(args.source)
    is_torch = not is_adapter and _is_torch_source(args)
    _refuse_meaningless(args, overrides, is_adapter, is_torch)
    _figure_paths(args)  # refused before anything is read
    original = args.reference and parity.import_original(args.reference)
    with multihost.lock_output(args.target):
        if is_adapter:
            lines = port_adapter(
                args.source,
                args.target,
                step=args.step,
                kind=args.adapter,
                base=args.base,
                overwrite=args.overwrite,
            )
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
    suffixes = tensor_files.SUFFIXES
    if not source.exists():
        raise UserError(
            f"nothing at {source}; name a torch file, a workdir or a checkpoint"
        )
    is_torch = not source.is_dir() or diffusers.is_diffusers_folder(source)
    is_file = target.suffix in suffixes
    if is_torch and to:
        raise UserError(f"--to {to} is for a checkpoint; {source} is none")
    if is_torch and is_file:
        raise UserError(f"{source} and {target} are both torch files; name a directory")
    if to and is_file:
        raise UserError(f"--to {to} writes a folder, not {target}")
    if not is_torch and not is_file and not to:
        raise UserError(
            f"{source} and {target} are both directories; name a "
            f"{', '.join(suffixes)}, or --to {' or '.join(LAYOUTS)}"
        )
    return is_torch


def _refuse_meaningless(args, overrides, is_adapter, is_torch):
    """Refuses flags that mean nothing on the way that is taken."""
    if overrides and not args.config:
        raise UserError(f"{overrides[0]} changes a --config, and none is given")
    source, reasons = args.source, {}
    if is_torch or (is_adapter and peft.is_adapter_folder(source)):
        reasons["step"] = f" is for a checkpoint, not {source}"
    if is_torch:
        reasons["figures"] = " goes into the card of an export"
    else:
        own = f": {source} brings its own config"
        reasons |= dict.fromkeys(("family", "heads", "config"), own)
    if is_adapter:
        network = " is for a network, not for adapters"
        reasons |= dict.fromkeys(("to", "reference", "figures"), network)
    elif args.to:
        reasons["reference"] = " is for a .pt, not for --to"
    for name, reason in reasons.items():
        if (value := getattr(args, name)) is not None:
            value = value[0] if name == "figures" else value
            raise UserError(f"--{name} {value}{reason}")


def to_checkpoint(
    args: argparse.Namespace, overrides: list[str], original: ModuleType | None = None
) -> None:
    """Converts a torch file or diffusers folder into a checkpoint directory."""
    target = require_free(args.target, args.overwrite)
    children = target.iterdir() if target.is_dir() else ()
    if others := [child.name for child in children if not child.name.isdecimal()]:
        raise UserError(
            f"{target} is not overwritten: it holds {', '.join(others)}, no checkpoint"
        )
    config = args.config and configs.load(args.config)
    if config:
        configs.override(config, overrides)
    source = pretrained.fetch(args.source)
    weights = open_torch_file(
        source, published, family=args.family, heads=args.heads, config=config
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
        export = CheckpointExport(name, meta["step"])
        parts = file.parts()
        compared = compare_tensors(export.tensors(*parts), parts)
        _print_parity(original, export, file.ema)
    _print_network(export, file.ema.dtypes)
    if file.ignored:
        print(f"left out: {', '.join(file.ignored)}")
    _print_comparison(compared, target, f"{file.path}, {file.layout}")
    print(
        f"{meta['sha256']}  {file.path}", f"{ema_hash}  ema, as sample.py's", sep="\n"
    )
    print(f"{target}/{meta['step']}")


def to_torch_file(args: argparse.Namespace, original: ModuleType | None = None) -> None:
    """Converts a step of a checkpoint into a torch file, or the files of MDT's run."""
    target = require_free(args.target, args.overwrite)
    export = _open_checkpoint(args)
    files, parts, left_out = export.torch_files(target)
    names = [*files, f"{target.name}.md"]
    paths = [require_free(target.with_name(n), args.overwrite) for n in names]
    arrays = [array for part in parts.values() for array in part.values()]
    require_space(target, sum(array.nbytes for array in arrays))
    with atomic_writes(paths) as folder:
        for name, content in files.items():
            print(f"writing {target.with_name(name)}", flush=True)
            tensor_files.write(folder / name, content)
        print("reading it back", flush=True)
        written = read_torch_file(folder / target.name)
        written_parts = written.parts()
        theirs = {part: written_parts[part] for part in parts}
        compared = compare_tensors(flatten_parts(parts), theirs)
        _print_parity(original, export, written.ema)
        shas = {name: sha256(folder / name) for name in files}
        text = model_card(
            export,
            name=target.name,
            shas=shas,
            figures=_figure_paths(args),
            is_training_file="opt" in files[target.name],
        )
        (folder / names[-1]).write_text(text)
    _print_network(export, ["float32"])
    if left_out:
        print(f"written: {left_out}")
    _print_comparison(compared, export, target)
    for name, sha in shas.items():
        print(f"{sha}  {target.with_name(name)}")


def to_folder(args: argparse.Namespace) -> None:
    """Converts a step of a checkpoint into a folder for the Hugging Face Hub."""
    target = require_free(args.target, args.overwrite)
    export = _open_checkpoint(args)
    shapes = export.spec.param_shapes.values()
    require_space(target, sum(4 * leaf.size for leaf in shapes))
    with atomic_write(target) as folder:
        print(f"writing {target}", flush=True)
        compared, lines = write_model_folder(
            folder,
            export,
            args.to,
            name=target.name,
            figures=_figure_paths(args),
        )
    _print_network(export, ["float32"])
    _print_comparison(compared, export, target)
    print(*lines, target, sep="\n")


def _open_checkpoint(args):
    directory, step = checkpoint.find_step(args.source)
    step = step if args.step is None else args.step
    print(f"converting {directory}/{step}", flush=True)
    return CheckpointExport(directory, step)


def _figure_paths(args):
    """Returns the paths of evaluate.py's JSON files, which can be read."""
    paths = [as_path(path) for path in args.figures or ()]
    for path in paths:
        if not path.is_file():
            raise UserError(f"--figures: no file at {path}")
        read_json(path)
    return paths


def _print_network(export, dtypes):
    """Prints the network and a row for each stack of layers."""
    spec = export.spec
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


def _print_comparison(compared, left, right):
    rows = [("part", "tensors", "largest difference", "sha256 of the tensors")]
    for part, sides in compared.items():
        rows.append((part, sides.num_tensors, f"{sides.max_difference:g}", sides.left))
        rows.append(("", "", "", sides.right))
    print(format_columns(rows))
    print(f"upper of each two: {left}", f"lower: {right}", sep="\n")


def _print_parity(original, export, state):
    if original is None:
        return
    differences = parity.compare_stages(
        original, export.spec.model, export.spec.shape, state, export.ema()
    )
    print(f"relative L2 difference to the network of {original.__file__}:")
    print(format_columns((stage, f"{value:.1e}") for stage, value in differences))


if __name__ == "__main__":
    main()
