"""XL/2's training step as a TPU's own compiler makes it, held to the design.

It needs no TPU, but libtpu: pip install libtpu, or PYTHONPATH=DIR after
pip install --no-deps --target DIR libtpu. A compilation takes one to two CPU minutes.
"""

import importlib
import importlib.util
import math
import re

import jax
import pytest

from sit_jax import config as configs
from sit_jax import hlo, placement, pod, program, sharding, topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
POD = {  # and a mesh of fsdp 16: then weights are cut into whole tiles, see docs/tpu.md
    "v4:4x4x4": {"mesh.data": 4},
    "v5e:4x4": {},
    "v5p:4x4x8": {"mesh.data": 8},
    "v6e:16x16": {"mesh.data": 16},
}
NAMES = ("sit_xl2", "dit_xl2", "mdtv2_xl2")
# At 512 px a batch of 1,024 does not fit sixteen chips of 16 GB with the policy `dots`.
CASES = [(name, slice_, {}) for name in NAMES for slice_ in POD] + [
    (f"{name}_512", slice_, {"model.remat": "full"} if slice_ == "v5e:4x4" else {})
    for name in ("sit_xl2", "dit_xl2")
    for slice_ in POD
]
BATCH = 1024


def compiled(name, slice_, changes, word="bf16"):
    """-> what of the program is looked at, and the shapes of the state."""
    devices = topology.devices(slice_)
    c = importlib.import_module(f"configs.{name}").get_config()
    settings = {"precision.training": word, "batch_size": BATCH} | POD[slice_]
    settings |= changes
    configs.override(c, [f"--config.{k}={v}" for k, v in settings.items()])
    mesh = sharding.make_mesh(**c.mesh, devices=devices)
    parts = program.training_recipe(c)
    shapes, _ = program.state_shapes(parts, mesh)
    lowered = program.lowered_step(c, parts, mesh, c.batch_size, "tpu")
    return pod.compile_for(lowered, devices[0]), shapes, mesh


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest_layer(params):
    """Bytes of the heaviest weight of one layer."""
    found = jax.tree_util.tree_leaves_with_path(params)
    stacked = [leaf for path, leaf in found if "blocks" in str(path[0])]
    return max(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in stacked)


@pytest.mark.parametrize("name, slice_, changes", CASES)
def test_the_step_of_a_pod(name, slice_, changes):
    made, shapes, mesh = compiled(name, slice_, changes)
    assert made is not None and made.free > 0, "does not fit"

    # no chip holds the whole optimizer; biases and small tables are whole
    rest = size(shapes) - size(shapes.params)
    split = size(shapes.params) / mesh.shape["fsdp"] + rest / mesh.size
    assert made.arguments < 1.05 * split + 0.05e9
    assert made.output < 1e6  # all of the state is in the memory of the old one
    assert hlo.aliased(made.text) >= len(jax.tree.leaves(shapes))

    found = hlo.collectives(made.text)
    gathered = [each for each in found if each.kind == "all-gather"]
    assert gathered or any(each.kind == "collective-permute" for each in found)
    most = max((each.bytes for each in gathered), default=0)
    assert most <= largest_layer(shapes.params)
    # whole batches of activations stay where they are
    tokens = math.prod((BATCH, 256, 1152)) * 2 // sharding.rows(mesh)
    assert all(each.bytes < tokens for each in found if each.kind == "all-to-all")

    wide = [each for each in hlo.products(made.text).elements() if each.left == "bf16"]
    assert len(wide) >= 20  # forward, backward twice, and again what is not kept
    assert {each.right for each in wide} == {"bf16"}


@pytest.mark.parametrize("word, asked", [("exact", {"highest"}), ("fast", {"default"})])
def test_words_of_precision_reach_every_wide_product(word, asked):
    changes = {"model.depth": 2, "batch_size": 64}
    made, _, _ = compiled("sit_xl2", "v5e:4x4", changes, word)
    wide = [
        each for each in hlo.products(made.text) if each.left == each.right == "f32"
    ]
    assert {each.precision for each in wide} == asked


def test_between_slices_only_gradients_and_weights_travel():
    """Two slices of v5e:4x4, data parallel between them, ZeRO-1 across both."""
    devices = topology.devices("v5e:4x4*2")
    assert len(devices) == 32
    c = importlib.import_module("configs.sit_xl2").get_config()
    settings = {"precision.training": "bf16", "model.depth": 2, "mesh.data": 2}
    configs.override(c, [f"--config.{k}={v}" for k, v in settings.items()])
    mesh = sharding.make_mesh(**c.mesh, devices=devices)
    parts = program.training_recipe(c)
    shapes, _ = program.state_shapes(parts, mesh)
    made = pod.compile_for(program.lowered_step(c, parts, mesh, 64, "tpu"), devices[0])
    assert made is not None and made.arguments < size(shapes) / 16
    once = jax.tree.leaves(placement.once(mesh, shapes.ema))
    assert any("data" in str(place.spec) for place in once)


def test_a_topology_that_libtpu_knows_is_counted_by_chips():
    for name in POD:
        dims = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
        devices = topology.devices(name)
        assert len(devices) == math.prod(dims)
        assert topology.available(devices[0]) > 15 * 2**30
