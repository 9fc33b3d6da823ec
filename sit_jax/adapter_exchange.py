"""Adapters to the files of PEFT and diffusers and back, and merged into their base."""

import re

import jax
import numpy as np

from sit_jax import checkpoint, lora_files, lora_names
from sit_jax.adapters import open_adapter, table_of
from sit_jax.base import base_shapes, load_adapted, load_base, trained_shapes
from sit_jax.config import build, from_json, spec, to_json
from sit_jax.drafts import draft, require_free
from sit_jax.errors import UserError
from sit_jax.lora import TABLE, Lora
from sit_jax.manifest import weights_hash
from sit_jax.models.kinds import kind_of
from sit_jax.recipe import recipe
from sit_jax.released import nest
from sit_jax.sharding import make_mesh
from sit_jax.stored import Grown, read
from sit_jax.training import init_params


def port(source, target, step=None, kind=None, base=None, overwrite=False):
    """LoRA between a checkpoint and files, or merged: -> lines that say what.

    kind: peft, diffusers, merged, or None for files that become a checkpoint of
    adapters over base. target: a folder, written whole or not at all.
    """
    target = require_free(target, overwrite)
    ours = {lora_files.CONFIG, lora_files.WEIGHTS, lora_files.DIFFUSERS}
    held = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if odd := [name for name in held - ours if not name.isdecimal()]:
        raise UserError(f"{target} is not overwritten: it holds {odd[0]}, no adapter")
    if kind in ("peft", "diffusers"):
        with draft(target) as name:
            name.mkdir()
            return [*write_files(source, step, name, kind), target]
    if kind == "merged":
        items, meta = merge(source, step)
    elif base is None:
        raise UserError(f"{source} holds adapters: add --base, the network they are of")
    else:
        items, meta = read_files(source, base)
    with draft(target) as name:
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
    parts = recipe(config)
    adapter = open_adapter(f"{directory}/{step}", parts.model, base_shapes(parts))
    pairs = lora_names.pairs(kind_of(type(parts.model)).rules, adapter.flat)
    if kind == "diffusers":
        if TABLE in adapter.flat:
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
    params, record = load_adapted(recipe(config), make_mesh(), directory, step, "ema")
    params = read(params)
    del config["adapter"]
    about = {"config": to_json(config), "step": 0, "merged": record}
    return {"params": params, "ema": params}, about


def read_files(source, base):
    """-> items and meta of a checkpoint of the adapters in files, over their base.

    base: a workdir or checkpoint.
    """
    directory, step = checkpoint.find(base)
    meta = checkpoint.read_meta(directory, step)
    if "config" not in meta:
        raise UserError(f"{base} has no config in its meta")
    config = from_json(meta["config"])
    model, shape = build(config.model), tuple(config.shape)
    shapes = jax.eval_shape(lambda k: init_params(model, shape, k), jax.random.key(0))
    adapter = open_adapter(source, model, shapes)
    more = adapter.flat.get(TABLE)
    new = len(more.more) if isinstance(more, Grown) else 0
    config.adapter = _settings(source, adapter, new)
    config.model.classes += new
    parts = recipe(config)
    params, record = load_base(parts, make_mesh(), base)
    if new:
        _require_rows(source, lora_files.read(source)[2], params)
    tree = jax.tree.map(np.asarray, nest(adapter.flat))
    checkpoint.compare(str(source), tree, trained_shapes(parts))
    about = {"config": to_json(config), "step": 0, "base": record}
    return {"params": tree, "ema": tree}, {**about, "from": str(source)}


def _settings(source, adapter, new):
    """The spec of a Lora that trains what was read."""
    nodes = {p: node for p, node in adapter.flat.items() if not isinstance(node, Grown)}
    if not nodes:
        raise UserError(f"{source} holds new rows alone, no adapters")
    first = next(iter(nodes.values()))
    rank = first.down.shape[-1]
    return spec(
        Lora,
        targets="|".join(map(re.escape, nodes)),
        rank=rank,
        alpha=float(first.scale * rank),
        dropout=adapter.dropout,
        dora=any(node.magnitude is not None for node in nodes.values()),
        new_classes=new,
    )


def _found(source, step):
    directory, newest = checkpoint.find(source)
    step = newest if step is None else step
    if "base" not in checkpoint.read_meta(directory, step):
        raise UserError(f"{directory}/{step} holds a network of its own, no adapters")
    return directory, step


def _table(parts, meta, adapter):
    if not isinstance(adapter.flat.get(TABLE), Grown):
        return None
    record = meta["base"]
    base, _ = load_base(parts, make_mesh(), record["path"], record)
    return table_of(adapter, base["cond"]["label"]["embedding"])


def _require_rows(source, table, params):
    """Refuses a table whose old rows were trained too: only new ones are kept."""
    base = np.asarray(params["cond"]["label"]["embedding"])
    if not np.array_equal(np.concatenate([table[: len(base) - 1], table[-1:]]), base):
        raise UserError(
            f"{source}: the rows of {lora_files.TABLE} that the base has too are other "
            "ones; only rows for new classes can be added"
        )
