"""Opens adapters from wherever they are, applies them, and writes other forms of them.

A checkpoint of adapters, or PEFT's or diffusers' files, become an Adapter;
`port_adapter` moves them between these forms, or merges them into a network.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax import checkpoint
from sit_jax.adapters.lora import LoRA
from sit_jax.adapters.weights import (
    LABEL_TABLE,
    ExtraRows,
    LoRAWeight,
    flatten,
    materialize,
    merge_adapters,
)
from sit_jax.config import build, spec, to_json
from sit_jax.convert import peft
from sit_jax.convert.open import (
    CheckpointWeights,
    LoadedWeights,
    adapter_shapes,
    base_shapes,
    load_adapted,
    load_base,
)
from sit_jax.convert.rules import rules_for
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.files import atomic_write
from sit_jax.manifest import weights_hash
from sit_jax.parallel.mesh import make_mesh, replicated


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Adapters without their base.

    flat: by path. base: record of the base, if it is known. table: the whole label
    table [K, D], where a file holds that and not its new rows.
    """

    path: str
    flat: dict[str, Any]
    base: dict[str, Any] | None = None
    dropout: float = 0.0
    table: np.ndarray | None = None

    @property
    def sha256(self) -> str:
        """Hash of all weights."""
        return weights_hash(self.flat)

    @property
    def new_rows(self) -> Any:
        """Rows that it adds to the label table [N, D], or None."""
        node = self.flat.get(LABEL_TABLE)
        while isinstance(node, LoRAWeight):
            node = node.base
        return node.new_rows if isinstance(node, ExtraRows) else None

    @property
    def new_classes(self) -> int:
        """How many classes it adds."""
        return 0 if self.new_rows is None else len(self.new_rows)


def open_adapter(
    path: str | Path, model: Any, shapes: dict, item: str = "ema"
) -> Adapter:
    """Opens a run, a checkpoint, or the files of PEFT or diffusers.

    Args:
      path: where they are.
      model: the network that they shall be put on.
      shapes: of its parameters.
      item: of a checkpoint, "ema" or "params".

    Raises:
      UserError: they are no adapters, or of another network.
    """
    if not peft.is_adapter_file(path):
        return _read_checkpoint(_open_checkpoint(path), str(path), item)
    files = peft.read_adapter_files(path)
    flat: dict[str, Any] = {}
    shapes = flatten_dict(shapes, sep="/")
    if files.pairs:
        flat = peft.from_pairs(rules_for(model), shapes, files.pairs, path)
    if files.table is not None:
        old, width = shapes[LABEL_TABLE].shape
        if files.table.shape[1] != width or len(files.table) < old:
            raise UserError(
                f"{path} is for another network: its label table is "
                f"{files.table.shape}, here it is {(old, width)}"
            )
        # new rows stand between the base's classes and the null label
        new_rows: Any = files.table[old - 1 : -1]
        flat[LABEL_TABLE] = ExtraRows(None, new_rows)
    if not flat:
        raise UserError(f"{path} holds no adapter")
    return Adapter(str(path), flat, None, files.dropout, files.table)


def apply_adapter(
    params: dict, adapter: Adapter, weight: float = 1.0, sha256: str | None = None
) -> dict:
    """Returns the parameters with an adapter over them.

    Args:
      params: of the base; other adapters may be on it.
      adapter: to put over them. Rows for new classes are as they are at any weight.
      weight: factor of its update.
      sha256: of the parameters, to compare with the base that the adapter names.
    """
    if adapter.base and sha256 not in (None, adapter.base["sha256"]):
        raise UserError(
            f"{adapter.path} belongs to other weights ({adapter.base['sha256'][:12]}, "
            f"{adapter.base['path']}), not to these ({sha256[:12]})"
        )
    nodes = flatten(params)
    if adapter.new_rows is not None:
        nodes[LABEL_TABLE] = _add_rows(adapter, nodes[LABEL_TABLE])
    for path, node in adapter.flat.items():
        if isinstance(node, LoRAWeight):
            nodes[path] = _over(adapter.path, path, node, nodes.get(path), weight)
    return unflatten_dict(nodes, sep="/")


def apply_adapters(
    params: dict,
    words: Sequence[str],
    model: Any,
    sha256: str | None,
    item: str = "ema",
) -> tuple[dict, list[dict[str, Any]]]:
    """Returns the parameters with the adapters of PATH or PATH:WEIGHT merged in.

    Also a record of each, for a manifest.
    """
    adapters, records = _open_words(words, model, params, item), []
    # new rows last, since another's adapter of the table knows nothing of them
    for adapter, weight in sorted(adapters, key=lambda pair: pair[0].new_classes):
        params = apply_adapter(params, adapter, weight, sha256)
    for adapter, weight in adapters:
        record = {"path": adapter.path, "weight": weight, "sha256": adapter.sha256}
        record["new_classes"] = adapter.new_classes
        records.append({**record, "base": adapter.base})
    return merge_adapters(params), records


def count_new_classes(
    words: Sequence[str], weights: LoadedWeights, item: str = "ema"
) -> int:
    """Counts the classes that adapters of PATH or PATH:WEIGHT add to opened weights."""
    if not words:
        return 0
    shapes = unflatten_dict(weights.shapes(), sep="/")
    adapters = _open_words(words, build(weights.config.model), shapes, item)
    return sum(adapter.new_classes for adapter, _ in adapters)


def parse_adapter(word: str) -> tuple[str, float]:
    """Returns path and weight of PATH:WEIGHT or PATH."""
    path, colon, weight = word.rpartition(":")
    if not colon or weight.startswith("//"):  # gs://...
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise UserError(f"--lora {word!r}: PATH, or PATH:WEIGHT as a:0.8") from error


def port_adapter(
    source: str | Path,
    target: str | Path,
    *,
    kind: str | None = None,
    base: str | Path | None = None,
    step: int | None = None,
) -> list[str]:
    """Moves LoRA between a checkpoint and files, or merges it into its base.

    Args:
      source: a run or checkpoint of adapters, or their files.
      target: a folder, written whole or not at all.
      kind: peft, diffusers, merged, or None for files that become a checkpoint.
      base: of files, the workdir or checkpoint that they belong to.
      step: of a checkpoint; default: the newest.

    Returns:
      lines that say what was written.
    """
    if kind in ("peft", "diffusers"):
        with atomic_write(target) as folder:
            folder.mkdir()
            weights = _open_checkpoint(source, step)
            return [_write_files(weights, folder, kind), str(target)]
    if kind == "merged":
        items, meta = _merge(_open_checkpoint(source, step))
    elif base is None:
        raise UserError(f"{source} holds adapters: add --base, the network they are of")
    else:
        items, meta = _read_files(source, base)
    with atomic_write(target) as folder:
        checkpoint.save_step(folder, meta["step"], meta, **items)
    return [f"{weights_hash(items['ema'])}  ema", f"{target}/{meta['step']}"]


def _write_files(weights, folder, kind):
    """Writes a checkpoint's EMA of adapters as files; returns a line that says so."""
    experiment = build_experiment(weights.config)
    adapter = _read_checkpoint(weights, str(weights))
    pairs = peft.to_pairs(rules_for(experiment.model), adapter.flat)
    if kind == "diffusers":
        if LABEL_TABLE in adapter.flat:
            raise UserError(
                "diffusers' files hold no label table; write --adapter peft"
            )
        peft.write_diffusers(folder, pairs)
    else:
        record, table = weights.meta["base"], None
        if adapter.new_rows is not None:
            node = adapter.flat[LABEL_TABLE]
            if isinstance(node, LoRAWeight):
                raise UserError(
                    f"{adapter.path}: the label table is both adapted and longer by "
                    f"{adapter.new_classes} rows, and PEFT's files hold one of the two"
                )
            base, _ = load_base(experiment, make_mesh(), record["path"], record)
            node = node.replace(base=flatten(base)[LABEL_TABLE])
            table = np.asarray(materialize(node))
        peft.write_peft(
            folder, pairs, record["path"], dropout=adapter.dropout, table=table
        )
    return f"{len(pairs)} modules adapted, of {weights}, for {kind}"


def _merge(weights):
    """Returns items and meta of a checkpoint of the network with adapters merged in."""
    config = weights.config
    adapter = _read_checkpoint(weights, str(weights))
    experiment = build_experiment(config)
    params, record = load_adapted(experiment, make_mesh(), weights, "ema")
    params = materialize(params)
    del config["adapter"]
    meta = {"config": to_json(config), "step": 0, "merged": record}
    meta["merged_adapter"] = {
        "path": adapter.path,
        "sha256": adapter.sha256,
        "new_classes": adapter.new_classes,
    }
    return {"params": params, "ema": params}, meta


def _read_files(source, base):
    """Returns items and meta of a checkpoint of the adapters in files."""
    config = CheckpointWeights(*checkpoint.find_step(base)).config
    below = build_experiment(config)
    adapter = open_adapter(source, below.model, base_shapes(below))
    config.adapter = _settings(source, adapter)
    config.model.classes += adapter.new_classes
    experiment = build_experiment(config)
    params, record = load_base(experiment, make_mesh(), base)
    _require_same_rows(adapter, flatten(params)[LABEL_TABLE])
    tree = jax.tree.map(np.asarray, unflatten_dict(adapter.flat, sep="/"))
    checkpoint.require_same_shapes(str(source), tree, adapter_shapes(experiment))
    meta = {"config": to_json(config), "step": 0, "base": record, "from": str(source)}
    return {"params": tree, "ema": tree}, meta


def _settings(source, adapter):
    """Returns the spec of a LoRA that trains what was read."""
    nodes = {p: n for p, n in adapter.flat.items() if isinstance(n, LoRAWeight)}
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
        new_classes=adapter.new_classes,
    )


def _open_checkpoint(path, step=None):
    directory, newest = checkpoint.find_step(path)
    weights = CheckpointWeights(directory, newest if step is None else step)
    if "base" not in weights.meta:
        raise UserError(
            f"{weights} holds a network of its own, no adapters: use --weights"
        )
    return weights


def _open_words(words, model, shapes, item):
    """Returns [(Adapter, weight)]; new classes may come with at most one."""
    pairs = map(parse_adapter, words)
    adapters = [(open_adapter(path, model, shapes, item), w) for path, w in pairs]
    growing = [adapter.path for adapter, _ in adapters if adapter.new_classes]
    if len(growing) > 1:
        raise UserError(
            f"--lora {growing[0]} and {growing[1]} both add classes to the label "
            "table, under the same numbers; take one of them"
        )
    return adapters


def _read_checkpoint(weights, path, item="ema"):
    """Returns the Adapter in a checkpoint; path names it in errors and records."""
    experiment = build_experiment(weights.config, roles=("model", "adapter"))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    like = jax.tree.map(put, adapter_shapes(experiment))
    tree = checkpoint.load(weights.path, weights.step, **{item: like})[item]
    tree = jax.tree.map(np.asarray, tree)  # to go where the base is
    dropout = experiment.adapter.dropout
    return Adapter(path, flatten(tree), weights.meta["base"], dropout)


def _add_rows(adapter, table):
    """The label table with an adapter's new rows."""
    rows, (_, width) = adapter.new_rows, table.shape
    if rows.shape[1] != width:
        raise UserError(
            f"{adapter.path} is for another network: its rows of {LABEL_TABLE} have "
            f"{rows.shape[1]} values, here they have {width}"
        )
    _require_same_rows(adapter, table)
    return ExtraRows(table, _put_beside(rows, table))


def _over(source, path, node, base, weight):
    """An adapter's node over a base or another adapter."""
    *lead, fan_in, _ = node.lora_a.shape
    size = (*lead, fan_in, node.lora_b.shape[-1])
    if base is None or tuple(base.shape) != size:
        here = "nothing" if base is None else tuple(base.shape)
        raise UserError(
            f"{source} is for another network: its {path} is {size}, here it is {here}"
        )
    is_adapted = isinstance(base, LoRAWeight)
    if is_adapted and not (node.magnitude is None and base.magnitude is None):
        raise UserError(
            f"{source}: {path} would have two adapters, one with lengths (DoRA), which "
            "are those of the base alone; use one at a time"
        )
    node = _put_beside(node, base)
    return node.replace(base=base, scale=node.scale * weight, dropout=0.0)


def _put_beside(node, base):
    """Puts an adapter where its base is: there the same product gives the same bits."""
    leaf = jax.tree.leaves(base)[0]
    if not isinstance(leaf, jax.Array):
        return node
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = replicated(sharding.mesh)
    return jax.device_put(node, sharding)


def _require_same_rows(adapter, table):
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
