"""The weights that adapters belong to: found, loaded, and known by their sha256.

A checkpoint of adapters holds nothing of its base. Its meta says where the base was,
and what the hash of its weights is; what is found there is held against that.
"""

from functools import partial

import jax

from sit_jax import checkpoint
from sit_jax.adapters.quantize import quantized_shapes
from sit_jax.adapters.weights import join, split_trainable
from sit_jax.config import difference, from_json, to_json
from sit_jax.convert import pretrained
from sit_jax.convert.tensor_files import SUFFIXES
from sit_jax.errors import UserError
from sit_jax.files import local_path
from sit_jax.manifest import weights_hash
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import device_put_global, with_shardings
from sit_jax.training.state import init_params

# Fields of a network that adapters may be trained with at other values.
FREE = ("remat", "unroll", "dtype", "hide", "spread", "classes")


def load_base(parts, mesh, path, record=None):
    """-> the averaged weights of a workdir or checkpoint, and their record.

    parts: an Experiment with an adapter; record: one that the weights must agree with.
    """
    shapes = base_shapes(parts)
    require_checkpoint(path)
    directory, step = checkpoint.find_step(path)
    if record and str(directory) == record["path"]:
        step = record["step"]
    meta = checkpoint.read_meta(directory, step)
    if "base" in meta:
        raise UserError(
            f"{path} holds adapters of {meta['base']['path']}, no network; merge them "
            f"first: port_weights.py {path} DIR --adapter merged"
        )
    form = meta.get("quantized", {}).get("form")
    if form == "w8a8":
        raise UserError(f"{path} is w8a8, through which no gradient goes: take w8, w4")
    if form and parts.adapter.int8:
        raise UserError(f"{path} is {form} already: leave out adapter.int8")
    if "config" in meta:
        _require_same(path, from_json(meta["config"]).model, parts)
    shapes = quantized_shapes(shapes, meta)
    params = _whole(mesh, shapes, directory, step)
    found = weights_hash(params)
    if record and record["sha256"] != found:
        raise UserError(
            f"{directory}/{step} is not the base of these adapters: its weights are "
            f"{found[:12]}, theirs were {record['sha256'][:12]} in {record['path']}"
        )
    params = device_put_global(params, sharding_rules.weight_shardings(mesh, shapes))
    return params, {"path": str(directory), "step": step, "sha256": found}


def require_checkpoint(path):
    """Refuses a published name or a torch file, with what makes a checkpoint of it."""
    if pretrained.find(path) or local_path(path).suffix in SUFFIXES:
        raise UserError(
            f"{path} is no checkpoint, which adapters need below them: make one with "
            f"port_weights.py {path} DIR, or quantize.py {path} DIR for int8 (QLoRA)"
        )


def _whole(mesh, shapes, directory, step):
    """The weights where this process can read them all, for their hash."""
    where = sharding_rules.weight_shardings(mesh, shapes)
    if not all(place.is_fully_addressable for place in jax.tree.leaves(where)):
        here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        where = jax.tree.map(lambda _: here, shapes)
    target = with_shardings(shapes, where)
    return checkpoint.load(directory, step, ema=target)["ema"]


def base_shapes(parts):
    """Shapes of the parameters of the network, below an adapter if there is one."""
    new = 0 if parts.adapter is None else parts.adapter.new_classes
    classes = parts.model.classes - new
    if classes < 1:
        raise UserError(
            f"model.classes is {parts.model.classes}, all of them new: adapter."
            f"new_classes is {parts.adapter.new_classes}; model.classes counts both"
        )
    model = parts.model.clone(classes=classes)
    init = partial(init_params, model, parts.shape)
    return jax.eval_shape(init, jax.random.key(0))


def trained_shapes(parts):
    """Shapes of what a checkpoint of an Experiment's adapters holds as params."""
    return split_trainable(jax.eval_shape(partial(_stored, parts), base_shapes(parts)))[
        0
    ]


def load_adapted(parts, mesh, directory, step, item, path=None):
    """-> weights with the adapters of a checkpoint over their base, and its record.

    path: where the base is now, if not where it was.
    """
    record = checkpoint.read_meta(directory, step)["base"]
    base, record = load_base(parts, mesh, path or record["path"], record)
    where = with_shardings(
        shapes := trained_shapes(parts), sharding_rules.weight_shardings(mesh, shapes)
    )
    trained = checkpoint.load(directory, step, **{item: where})[item]
    _, frozen = split_trainable(
        parts.adapter.add_adapters(parts.adapter.quantize_base(base), jax.random.key(0))
    )
    return join(trained, frozen), record


def _stored(parts, base):
    return parts.adapter.add_adapters(base, jax.random.key(0))


def _require_same(path, theirs, parts):
    """Refuses a base whose network is not the config's, down to the heads."""
    ours = parts.model
    theirs = to_json(theirs)
    found = {"make": to_json(type(ours))} | {
        name: to_json(getattr(ours, name)) for name in theirs if hasattr(ours, name)
    }
    pick = lambda fields: {n: v for n, v in fields.items() if n not in FREE}
    classes = parts.model.classes - parts.adapter.new_classes
    unlike = difference(pick(theirs), pick(found))
    if theirs["classes"] != classes and not unlike and parts.adapter.new_classes:
        raise UserError(
            f"{path} has {theirs['classes']} classes and the data {ours.classes}: "
            f"that makes {ours.classes - theirs['classes']} new ones, but "
            f"adapter.new_classes is {parts.adapter.new_classes}"
        )
    if theirs["classes"] != classes:
        unlike.append(("classes", theirs["classes"], classes))
    if unlike:
        listed = "; ".join(f"model.{n} is {a}, not {b}" for n, a, b in unlike)
        raise UserError(f"{path} holds another network: {listed}")
