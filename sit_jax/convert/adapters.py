"""Adapters opened from wherever they are, and put on a network's weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax import checkpoint
from sit_jax.adapters.weights import (
    LABEL_TABLE,
    ExtraRows,
    LoRAWeight,
    is_weight_leaf,
    materialize,
    merge_adapters,
)
from sit_jax.config import build, from_json
from sit_jax.convert import lora_files, lora_names
from sit_jax.convert.base import trained_shapes
from sit_jax.convert.rules import rules_for
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.manifest import weights_hash
from sit_jax.parallel.mesh import replicated


@dataclasses.dataclass(frozen=True)
class Adapter:
    """flat: our adapters by path, without a base; base: its record, if it is known.

    table: the whole label table [K, D], where a file holds that and not its new rows.
    """

    path: str
    flat: dict[str, Any]
    base: dict | None = None
    dropout: float = 0.0
    table: np.ndarray | None = None

    @property
    def sha256(self):
        return weights_hash(self.flat)

    @property
    def more(self):
        """Rows that it adds to the label table [N, D], or None."""
        node = self.flat.get(LABEL_TABLE)
        while isinstance(node, LoRAWeight):
            node = node.base
        return node.new_rows if isinstance(node, ExtraRows) else None

    @property
    def new_classes(self):
        return 0 if self.more is None else len(self.more)


def open_adapter(path, model, shapes, item="ema"):
    """-> Adapter of a run, a checkpoint, or the files of PEFT or diffusers.

    model, and shapes of its parameters: the network that it shall be put on.
    """
    flat = flatten_dict(shapes, sep="/")
    if not lora_files.is_adapter(path):
        return _of_checkpoint(path, item)
    pairs, dropout, table = lora_files.read(path)
    rules = rules_for(model)
    found = lora_names.adapters(rules, flat, pairs, path) if pairs else {}
    if table is not None:
        found[LABEL_TABLE] = _new_rows(path, table, flat)
    if not found:
        raise UserError(f"{path} holds no adapter")
    return Adapter(str(path), found, None, dropout, table)


def put_on(params, adapter, weight=1.0, sha256=None):
    """The parameters with an adapter, `weight` times as strong, over them.

    Rows for new classes are as they are at any weight. sha256: of the parameters, to
    be held against the base that the adapter names.
    """
    if adapter.base and sha256 not in (None, adapter.base["sha256"]):
        raise UserError(
            f"{adapter.path} belongs to other weights ({adapter.base['sha256'][:12]}, "
            f"{adapter.base['path']}), not to these ({sha256[:12]})"
        )
    nodes = flattened(params)
    if adapter.more is not None:
        nodes[LABEL_TABLE] = _grown(adapter, nodes[LABEL_TABLE])
    for path, node in adapter.flat.items():
        if isinstance(node, LoRAWeight):
            nodes[path] = _over(adapter.path, path, node, nodes.get(path), weight)
    return unflatten_dict(nodes, sep="/")


def opened(words, model, shapes, item="ema"):
    """-> [(Adapter, weight)] of PATH or PATH:WEIGHT; new classes bring at most one."""
    pairs = [(open_adapter(p, model, shapes, item), w) for p, w in map(named, words)]
    growing = [adapter.path for adapter, _ in pairs if adapter.new_classes]
    if len(growing) > 1:
        raise UserError(
            f"--lora {growing[0]} and {growing[1]} both add classes to the label "
            "table, under the same numbers; take one of them"
        )
    return pairs


def new_classes(words, weights, item="ema"):
    """How many classes the adapters of PATH or PATH:WEIGHT add to opened weights."""
    if not words:
        return 0
    shapes = unflatten_dict(weights.shapes(), sep="/")
    pairs = opened(words, build(weights.config.model), shapes, item)
    return sum(adapter.new_classes for adapter, _ in pairs)


def put_all(params, words, model, sha256, item="ema"):
    """-> parameters with the adapters of PATH or PATH:WEIGHT merged in, and records."""
    pairs, records = opened(words, model, params, item), []
    # new rows last, for another's adapter of the table knows nothing of them
    for adapter, weight in sorted(pairs, key=lambda pair: pair[0].new_classes):
        params = put_on(params, adapter, weight, sha256)
    for adapter, weight in pairs:
        record = {"path": adapter.path, "weight": weight, "sha256": adapter.sha256}
        record["new_classes"] = adapter.new_classes
        records.append({**record, "base": adapter.base})
    return merge_adapters(params), records


def taken_out(params, adapter):
    """The parameters [..] that an adapter was merged into, without it and its rows.

    Each way rounds once. With lengths (DoRA) there is no way back: those of the base
    are not kept.
    """
    nodes = flattened(params)
    for path, node in adapter.flat.items():
        if not isinstance(node, LoRAWeight):
            continue
        if node.magnitude is not None:
            raise UserError(
                f"{adapter.path} has lengths (DoRA), in whose place the base's are not "
                "kept: no way back; take the base itself"
            )
        nodes[path] = nodes[path] - node.scale * (node.lora_a @ node.lora_b)
    if new := adapter.new_classes:
        table = nodes[LABEL_TABLE]
        nodes[LABEL_TABLE] = jnp.concatenate([table[: -1 - new], table[-1:]])
    return unflatten_dict(nodes, sep="/")


def named(word):
    """PATH:WEIGHT or PATH -> path, weight."""
    path, colon, weight = word.rpartition(":")
    if not colon or weight.startswith("//"):  # gs://...
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise UserError(f"--lora {word!r}: PATH, or PATH:WEIGHT as a:0.8") from error


def _grown(adapter, table):
    """The label table with an adapter's new rows."""
    more, (_, width) = adapter.more, table.shape
    if more.shape[1] != width:
        raise UserError(
            f"{adapter.path} is for another network: its rows of {LABEL_TABLE} have "
            f"{more.shape[1]} values, here they have {width}"
        )
    require_same_rows(adapter, table)
    return ExtraRows(table, _beside(more, jax.tree.leaves(table)[0]))


def _over(where, path, node, base, weight):
    *_, fan_in, _ = node.lora_a.shape
    size = (*node.lora_a.shape[:-2], fan_in, node.lora_b.shape[-1])
    if base is None or tuple(base.shape) != size:
        found = "nothing" if base is None else tuple(base.shape)
        raise UserError(
            f"{where} is for another network: its {path} is {size}, here it is {found}"
        )
    lengths = isinstance(base, LoRAWeight) and (node.magnitude, base.magnitude)
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
        where = replicated(where.mesh)
    return node if where is None else jax.device_put(node, where)


def _of_checkpoint(path, item):
    directory, step = checkpoint.find_step(path)
    meta = checkpoint.read_meta(directory, step)
    if "base" not in meta:
        raise UserError(
            f"{path} holds a network of its own, no adapters: use --weights"
        )
    like = trained_shapes(build_experiment(from_json(meta["config"])))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    like = jax.tree.map(put, like)
    tree = checkpoint.load(directory, step, **{item: like})[item]
    dropout = from_json(meta["config"]).adapter.dropout
    tree = jax.tree.map(np.asarray, tree)  # to go where the base is
    return Adapter(str(path), flattened(tree), meta["base"], dropout)


def _new_rows(path, table, flat):
    """The rows between the base's classes and the null label."""
    old, width = flat[LABEL_TABLE].shape
    if table.shape[1] != width or len(table) < old:
        raise UserError(
            f"{path} is for another network: its label table is {table.shape}, "
            f"here it is {(old, width)}"
        )
    return ExtraRows(None, table[old - 1 : -1])


def require_same_rows(adapter, table):
    """Refuses a whole table whose old rows were trained too: only new ones are kept."""
    if adapter.table is None:
        return
    ours, theirs = np.asarray(materialize(table)), adapter.table
    old = np.concatenate([theirs[: len(ours) - 1], theirs[-1:]])
    if not np.array_equal(old, ours):
        raise UserError(
            f"{adapter.path}: the rows of the label table that the base has too are "
            "other ones; only rows for new classes can be added"
        )


def table_of(adapter, base):
    """The whole label table [K, D] where an adapter adds rows to base's, else None."""
    if adapter.more is None:
        return None
    node = adapter.flat[LABEL_TABLE]
    if isinstance(node, LoRAWeight):
        raise UserError(
            f"{adapter.path}: the label table is both adapted and longer by "
            f"{adapter.new_classes} rows, and PEFT's files hold one of the two"
        )
    return np.asarray(materialize(node.replace(base=base)))


def flattened(tree):
    """-> {path: array or stored weight}"""
    return flatten_dict(tree, is_leaf=lambda _, node: is_weight_leaf(node), sep="/")
