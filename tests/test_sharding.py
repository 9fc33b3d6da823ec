"""Meshes, and where weights and batches live on them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from sit_jax.errors import UserError
from sit_jax.sharding import everywhere, make_mesh, shaped, split_batch, split_weights


def shapes(**leaves):
    return {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in leaves.items()}


@pytest.mark.parametrize(
    "asked, made",
    [
        ({}, (1, 8)),
        ({"data": -1, "fsdp": 1}, (8, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4)),
        ({"data": -1, "fsdp": 2}, (4, 2)),
        ({"data": 8, "fsdp": -1}, (8, 1)),
    ],
)
def test_sizes_of_a_mesh(asked, made):
    mesh = make_mesh(**asked)
    assert dict(mesh.shape) == {"data": made[0], "fsdp": made[1]}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)  # diffrax needs it


def test_a_mesh_of_some_devices():
    assert make_mesh(devices=jax.devices()[:2]).size == 2
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "data, fsdp", [(3, -1), (2, 2), (-1, -1), (0, -1), (-2, -4), (-2, -1), (16, 1)]
)
def test_sizes_that_do_not_make_up_the_devices_are_refused(data, fsdp):
    with pytest.raises(UserError, match=f"data={data} x fsdp={fsdp} .* 8 devices"):
        make_mesh(data, fsdp)


@pytest.mark.parametrize("data, fsdp", [(8, 1), (2, 4), (1, 8)])
def test_each_device_gets_its_own_rows_of_a_batch(data, fsdp):
    batch = jax.device_put(np.arange(16), split_batch(make_mesh(data, fsdp)))
    rows = sorted(tuple(np.asarray(s.data)) for s in batch.addressable_shards)
    assert rows == [(i, i + 1) for i in range(0, 16, 2)]


def test_large_weights_are_split_along_their_longest_axis_that_divides():
    tree = shapes(
        wide=(256, 1024), tall=(1024, 256), odd=(1001, 24), prime=(1009, 1013)
    )
    found = split_weights(make_mesh(), tree)
    assert {name: s.spec for name, s in found.items()} == {
        "wide": PartitionSpec(None, "fsdp"),
        "tall": PartitionSpec("fsdp", None),
        "odd": PartitionSpec(None, "fsdp"),
        "prime": PartitionSpec(None, None),
    }


def test_small_weights_and_all_without_fsdp_stay_whole():
    tree = shapes(bias=(2**14,), table=(2**15, 8))
    assert split_weights(make_mesh(), tree)["bias"].is_fully_replicated
    assert not split_weights(make_mesh(), tree)["table"].is_fully_replicated
    whole = split_weights(make_mesh(data=-1, fsdp=1), tree)
    assert all(s.is_fully_replicated for s in whole.values())


def test_stacked_blocks_are_never_split_along_the_layers():
    leaf = shapes(kernel=(1024, 64, 48))
    tree = {"params": {"blocks": leaf}, "moments": [{"blocks": leaf}], "other": leaf}
    found = split_weights(make_mesh(), tree)
    for stacked in (found["params"]["blocks"], found["moments"][0]["blocks"]):
        assert stacked["kernel"].spec == PartitionSpec(None, "fsdp", None)
    assert found["other"]["kernel"].spec == PartitionSpec("fsdp", None, None)


def test_a_split_weight_is_held_once():
    mesh = make_mesh()
    weight = np.arange(2**16, dtype=np.float32).reshape(256, 256)
    where = split_weights(mesh, {"w": weight})["w"]
    placed = jax.device_put(weight, where)
    assert sum(s.data.size for s in placed.addressable_shards) == weight.size
    np.testing.assert_array_equal(placed, weight)


def test_shapes_with_places_are_targets_to_restore_into():
    mesh, tree = make_mesh(), shapes(a=(3,), b=(256, 256))
    target = shaped(tree, split_weights(mesh, tree))
    assert target["a"].shape == (3,) and target["a"].sharding == everywhere(mesh)
    assert target["b"].sharding.spec == PartitionSpec(None, "fsdp")
