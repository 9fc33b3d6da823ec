"""Which way port_weights.py goes, and which of its flags mean nothing on that way."""

from sit_jax.convert import diffusers_files, lora_files, model_folder, tensor_files
from sit_jax.errors import UserError
from sit_jax.files import as_path


def is_adapter(args):
    """Whether adapters are read, written, or taken out, and not a network."""
    asked = args.adapter or args.base or args.unmerge
    return bool(asked) or lora_files.is_adapter_folder(args.source)


def inwards(source, target, to):
    """Whether torch weights become a checkpoint, by the kinds of the two paths."""
    source, target = as_path(source), as_path(target)
    if not source.exists():
        raise UserError(
            f"nothing at {source}; name a torch file, a workdir or a checkpoint"
        )
    foreign = not source.is_dir() or diffusers_files.is_folder(source)
    is_file, ends = target.suffix in tensor_files.KINDS, ", ".join(tensor_files.KINDS)
    if foreign and to:
        raise UserError(f"--to {to} is for a checkpoint; {source} is none")
    if foreign and is_file:
        raise UserError(f"{source} and {target} are both torch files; name a directory")
    if to and is_file:
        raise UserError(f"--to {to} writes a folder, not {target}")
    if not foreign and not is_file and not to:
        raise UserError(
            f"{source} and {target} are both directories; name a {ends}, or --to "
            f"{' or '.join(model_folder.LAYOUTS)}"
        )
    return foreign


def refuse_others(args, overrides, inwards):
    """Flags of the other direction."""
    if overrides and not args.config:
        raise UserError(f"{overrides[0]} changes a --config, and none is given")
    if inwards and args.step is not None:
        raise UserError(f"--step {args.step} is for a checkpoint, not {args.source}")
    if args.figures and inwards:
        raise UserError(f"--figures {args.figures[0]} goes into the card of an export")
    if args.to and args.reference:
        raise UserError(f"--reference {args.reference} is for a .pt, not for --to")
    for name in () if inwards else ("family", "heads", "config"):
        if (value := getattr(args, name)) is not None:
            raise UserError(f"--{name} {value}: {args.source} brings its own config")


def refuse_beside_adapters(args):
    """Flags that mean nothing where adapters are written, read or taken out."""
    if args.unmerge and (args.adapter or args.base):
        other = f"--adapter {args.adapter}" if args.adapter else f"--base {args.base}"
        raise UserError(f"--unmerge {args.unmerge} and {other}: one at a time")
    if lora_files.is_adapter_folder(args.source) and args.step is not None:
        raise UserError(f"--step {args.step} is for a checkpoint, not {args.source}")
    for name in ("to", "reference", "figures"):
        if (value := getattr(args, name)) is not None:
            value = value[0] if name == "figures" else value
            raise UserError(f"--{name} {value} is for a network, not for adapters")
