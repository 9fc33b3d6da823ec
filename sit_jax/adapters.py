"""Adapters opened from wherever they are, and put on a network's weights."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax import checkpoint, lora_files, lora_names
from sit_jax.base import trained_shapes
from sit_jax.config import from_json
from sit_jax.errors import UserError
from sit_jax.lora import TABLE
from sit_jax.manifest import weights_hash
from sit_jax.models.kinds import kind_of
from sit_jax.recipe import recipe
from sit_jax.sharding import everywhere
from sit_jax.stored import Adapted, Grown, is_stored, merged, read


@dataclasses.dataclass(frozen=True)
class Adapter:
    """flat: our adapters by path, without a base; base: its record, if it is known."""

    path: str
    flat: dict[str, Any]
    base: dict | None = None
    dropout: float = 0.0

    @property
    def sha256(self):
        return weights_hash(self.flat)


def open_adapter(path, model, shapes, item="ema"):
    """-> Adapter of a run, a checkpoint, or the files of PEFT or diffusers.

    model, and shapes of its parameters: the network that it shall be put on.
    """
    flat = flatten_dict(shapes, sep="/")
    if not lora_files.is_adapter(path):
        return _of_checkpoint(path, item)
    pairs, dropout, table = lora_files.read(path)
    rules = kind_of(type(model)).rules
    found = lora_names.adapters(rules, flat, pairs, path) if pairs else {}
    if table is not None:
        found[TABLE] = _new_rows(path, table, flat)
    if not found:
        raise UserError(f"{path} holds no adapter")
    return Adapter(str(path), found, None, dropout)


def put_on(params, adapter, weight=1.0, sha256=None):
    """The parameters with an adapter, `weight` times as strong, over them.

    sha256: of the parameters, to be held against the base that the adapter names.
    """
    if adapter.base and sha256 not in (None, adapter.base["sha256"]):
        raise UserError(
            f"{adapter.path} belongs to other weights ({adapter.base['sha256'][:12]}, "
            f"{adapter.base['path']}), not to these ({sha256[:12]})"
        )
    nodes = flattened(params)
    for path, node in adapter.flat.items():
        nodes[path] = _over(adapter.path, path, node, nodes.get(path), weight)
    return unflatten_dict(nodes, sep="/")


def put_all(params, words, model, sha256, item="ema"):
    """-> parameters with the adapters of PATH or PATH:WEIGHT merged in, and records."""
    records = []
    for word in words:
        path, weight = named(word)
        adapter = open_adapter(path, model, params, item)
        params = put_on(params, adapter, weight, sha256)
        record = {"path": path, "weight": weight, "sha256": adapter.sha256}
        records.append({**record, "base": adapter.base})
    return merged(params), records


def named(word):
    """PATH:WEIGHT or PATH -> path, weight."""
    path, colon, weight = word.rpartition(":")
    if not colon:
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise UserError(f"--lora {word!r}: PATH, or PATH:WEIGHT as a:0.8") from error


def _over(where, path, node, base, weight):
    if isinstance(node, Grown):
        raise UserError(
            f"{where} adds {len(node.more)} classes to the label table; sample its "
            "run by itself, with --weights"
        )
    *_, fan_in, _ = node.down.shape
    size = (*node.down.shape[:-2], fan_in, node.up.shape[-1])
    if base is None or tuple(base.shape) != size:
        found = "nothing" if base is None else tuple(base.shape)
        raise UserError(
            f"{where} is for another network: its {path} is {size}, here it is {found}"
        )
    lengths = isinstance(base, Adapted) and (node.magnitude, base.magnitude)
    if lengths and lengths != (None, None):
        raise UserError(
            f"{where}: {path} would have two adapters, one with lengths (DoRA), which "
            "are those of the base alone; use one at a time"
        )
    node = _beside(node, jax.tree.leaves(base)[0])
    return node.replace(base=base, scale=node.scale * weight, dropout=0.0)


def _beside(node, leaf):
    """On the devices of an array, where the same product gives the same bits."""
    where = getattr(leaf, "sharding", None)
    if isinstance(where, jax.sharding.NamedSharding):
        where = everywhere(where.mesh)
    return node if where is None else jax.device_put(node, where)


def _of_checkpoint(path, item):
    directory, step = checkpoint.find(path)
    meta = checkpoint.read_meta(directory, step)
    if "base" not in meta:
        raise UserError(
            f"{path} holds a network of its own, no adapters: use --weights"
        )
    like = trained_shapes(recipe(from_json(meta["config"])))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    like = jax.tree.map(put, like)
    tree = checkpoint.load(directory, step, **{item: like})[item]
    dropout = from_json(meta["config"]).adapter.dropout
    tree = jax.tree.map(np.asarray, tree)  # to go where the base is
    return Adapter(str(path), flattened(tree), meta["base"], dropout)


def _new_rows(path, table, flat):
    """The rows between the base's classes and the null label."""
    old, width = flat[TABLE].shape
    if table.shape[1] != width or len(table) < old:
        raise UserError(
            f"{path} is for another network: its label table is {table.shape}, "
            f"here it is {(old, width)}"
        )
    return Grown(None, table[old - 1 : -1])


def table_of(adapter, base):
    """The whole label table [K, D] where an adapter adds rows to base's, else None."""
    node = adapter.flat.get(TABLE)
    if not isinstance(node, Grown):
        return None
    return np.asarray(read(node.replace(base=base)))


def flattened(tree):
    """-> {path: array or stored weight}"""
    return flatten_dict(tree, is_leaf=lambda _, node: is_stored(node), sep="/")
