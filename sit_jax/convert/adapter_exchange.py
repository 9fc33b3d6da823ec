"""Adapters to the files of PEFT and diffusers and back, and merged into their base."""

import re

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from sit_jax import checkpoint
from sit_jax.adapters.lora import LoRA
from sit_jax.adapters.weights import LABEL_TABLE, ExtraRows, materialize
from sit_jax.config import from_json, spec, to_json
from sit_jax.convert import lora_files, lora_names
from sit_jax.convert.adapters import (
    open_adapter,
    require_same_rows,
    table_of,
    taken_out,
)
from sit_jax.convert.base import base_shapes, load_adapted, load_base, trained_shapes
from sit_jax.convert.rules import rules_for
from sit_jax.convert.weights import Directory
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.files import atomic_write, require_free
from sit_jax.manifest import weights_hash
from sit_jax.parallel.mesh import make_mesh


def port(source, target, step=None, kind=None, base=None, away=None, overwrite=False):
    """LoRA between a checkpoint and files, merged, or out again: -> lines that tell.

    kind: peft, diffusers, merged, or None for files that become a checkpoint of
    adapters over base. away: adapters to take out of the merged weights in source.
    target: a folder, written whole or not at all.
    """
    target = require_free(target, overwrite)
    ours = {lora_files.CONFIG, lora_files.WEIGHTS, lora_files.DIFFUSERS}
    held = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if odd := [name for name in held - ours if not name.isdecimal()]:
        raise UserError(f"{target} is not overwritten: it holds {odd[0]}, no adapter")
    if kind in ("peft", "diffusers"):
        with atomic_write(target) as name:
            name.mkdir()
            return [*write_files(source, step, name, kind), target]
    if kind == "merged":
        items, meta = merge(source, step)
    elif away is not None:
        items, meta = unmerge(source, step, away)
    elif base is None:
        raise UserError(f"{source} holds adapters: add --base, the network they are of")
    else:
        items, meta = read_files(source, base)
    with atomic_write(target) as name:
        saved = checkpoint.Checkpoints(name, items=items)
        saved.save(meta["step"], meta, **items)
        saved.close()
    return [f"{weights_hash(items['ema'])}  ema", f"{target}/{meta['step']}"]


def write_files(source, step, folder, kind):
    """A checkpoint's averaged adapters as files in a folder; -> lines that say what.

    kind: peft, or diffusers.
    """
    directory, step = _found(source, step)
    meta = checkpoint.read_meta(directory, step)
    config = from_json(meta["config"])
    parts = build_experiment(config)
    adapter = open_adapter(f"{directory}/{step}", parts.model, base_shapes(parts))
    pairs = lora_names.pairs(rules_for(parts.model), adapter.flat)
    if kind == "diffusers":
        if LABEL_TABLE in adapter.flat:
            raise UserError(
                "diffusers' files hold no label table; write --adapter peft"
            )
        lora_files.write_diffusers(folder, pairs)
    else:
        table = _table(parts, meta, adapter)
        base = meta["base"]["path"]
        lora_files.write_peft(folder, pairs, base, adapter.dropout, table)
    return [f"{len(pairs)} modules adapted, of {directory}/{step}, for {kind}"]


def merge(source, step):
    """-> items and meta of a checkpoint of the network with the adapters in it."""
    directory, step = _found(source, step)
    meta = checkpoint.read_meta(directory, step)
    config = from_json(meta["config"])
    parts = build_experiment(config)
    adapter = open_adapter(f"{directory}/{step}", parts.model, base_shapes(parts))
    params, record = load_adapted(parts, make_mesh(), directory, step, "ema")
    params = materialize(params)
    del config["adapter"]
    about = {"config": to_json(config), "step": 0, "merged": record}
    about["merged_adapter"] = {
        "path": adapter.path,
        "sha256": adapter.sha256,
        "new_classes": adapter.new_classes,
    }
    return {"params": params, "ema": params}, about


def unmerge(source, step, away):
    """-> items and meta of a checkpoint of the network before merge put adapters in.

    away: those adapters, in any form; refused if others are there, or none.
    """
    directory, newest = checkpoint.find_step(source)
    step = newest if step is None else step
    meta = checkpoint.read_meta(directory, step)
    base, told = meta.get("merged"), meta.get("merged_adapter")
    if told is None:
        raise UserError(
            f"--unmerge {away}: {directory}/{step} names no adapters merged into it"
        )
    config = from_json(meta["config"])
    config.model.classes -= told["new_classes"]
    parts = build_experiment(config)
    adapter = open_adapter(away, parts.model, base_shapes(parts))
    if adapter.base and adapter.base["sha256"] != base["sha256"]:
        raise UserError(
            f"{away} belongs to other weights ({adapter.base['sha256'][:12]}, "
            f"{adapter.base['path']}), not to those below {directory}/{step} "
            f"({base['sha256'][:12]}, {base['path']})"
        )
    if adapter.sha256 != told["sha256"]:
        raise UserError(
            f"{away} is not in {directory}/{step}: it is {adapter.sha256[:12]}, there "
            f"is {told['sha256'][:12]}, of {told['path']}"
        )
    there = Directory(directory, step)
    params = there.load(
        "ema", build_experiment(there.config), make_mesh(data=-1, fsdp=1)
    )
    params = taken_out(params, adapter)
    about = {"config": to_json(config), "step": 0, "unmerged": base}
    return {"params": params, "ema": params}, about


def read_files(source, base):
    """-> items and meta of a checkpoint of the adapters in files, over their base.

    base: a workdir or checkpoint.
    """
    directory, step = checkpoint.find_step(base)
    meta = checkpoint.read_meta(directory, step)
    if "config" not in meta:
        raise UserError(f"{base} has no config in its meta")
    config = from_json(meta["config"])
    below = build_experiment(config)
    adapter = open_adapter(source, below.model, base_shapes(below))
    new = adapter.new_classes
    config.adapter = _settings(source, adapter, new)
    config.model.classes += new
    parts = build_experiment(config)
    params, record = load_base(parts, make_mesh(), base)
    require_same_rows(adapter, params["cond"]["label"]["embedding"])
    tree = jax.tree.map(np.asarray, unflatten_dict(adapter.flat, sep="/"))
    checkpoint.require_same_shapes(str(source), tree, trained_shapes(parts))
    about = {"config": to_json(config), "step": 0, "base": record}
    return {"params": tree, "ema": tree}, {**about, "from": str(source)}


def _settings(source, adapter, new):
    """The spec of a LoRA that trains what was read."""
    nodes = {
        p: node for p, node in adapter.flat.items() if not isinstance(node, ExtraRows)
    }
    if not nodes:
        raise UserError(f"{source} holds new rows alone, no adapters")
    first = next(iter(nodes.values()))
    rank = first.lora_a.shape[-1]
    return spec(
        LoRA,
        targets="|".join(map(re.escape, nodes)),
        rank=rank,
        alpha=float(first.scale * rank),
        dropout=adapter.dropout,
        dora=any(node.magnitude is not None for node in nodes.values()),
        new_classes=new,
    )


def _found(source, step):
    directory, newest = checkpoint.find_step(source)
    step = newest if step is None else step
    if "base" not in checkpoint.read_meta(directory, step):
        raise UserError(f"{directory}/{step} holds a network of its own, no adapters")
    return directory, step


def _table(parts, meta, adapter):
    if adapter.more is None:
        return None
    record = meta["base"]
    base, _ = load_base(parts, make_mesh(), record["path"], record)
    return table_of(adapter, base["cond"]["label"]["embedding"])
