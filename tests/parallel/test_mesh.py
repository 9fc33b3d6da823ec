"""Meshes, batches split over them, and what programs are told of both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sit_jax.errors import UserError
from sit_jax.parallel.mesh import (
    AXES,
    abstract_mesh,
    batch_sharding,
    data_parallel,
    fsdp_groups,
    fully_sharded,
    hybrid_parallel,
    make_mesh,
    num_batch_shards,
    replicated,
    shard_batch,
    tensor_parallel,
    unshard_weight,
    with_mesh,
    with_shardings,
)


@pytest.mark.parametrize(
    "asked, made",
    [
        ({}, (1, 8, 1)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1)),  # as earlier runs have it, no tensor
        ({"data": 2, "fsdp": 4}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 2)),
        (data_parallel(), (8, 1, 1)),
        (fully_sharded(), (1, 8, 1)),
        (tensor_parallel(4), (1, 2, 4)),
        (hybrid_parallel(2), (2, 4, 1)),
        (fsdp_groups(), (1, 8, 1)),
        (fsdp_groups() | {"tensor": 4}, (1, 2, 4)),
    ],
)
def test_sizes_of_a_mesh(asked, made):
    mesh = make_mesh(**asked)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, made, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}  # diffrax needs it
    assert abstract_mesh(8, **asked).shape == mesh.shape


@pytest.mark.parametrize(
    "count, data, fsdp", [(16, 1, 16), (24, 2, 12), (256, 16, 16), (17, 17, 1)]
)
def test_fsdp_groups_are_as_large_as_divides_up_to_sixteen(count, data, fsdp):
    mesh = abstract_mesh(count, **fsdp_groups())
    assert dict(mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": 1}


@pytest.mark.parametrize(
    "sizes",
    [(3, -1), (2, 2), (0, -1), (-2, -4), (-2, -1), (16, 1), (1, -1, 3), (-1, -1, 3)]
    + [(-1, -1, 0), (-1, -1, -1), (-1, 2, -1)],
)
def test_sizes_that_do_not_make_up_the_devices_are_refused(sizes):
    data, fsdp, tensor = (*sizes, 1)[:3]
    message = f"data={data} x fsdp={fsdp} x tensor={tensor} .* 8 devices"
    with pytest.raises(UserError, match=message):
        make_mesh(*sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "a chip"


def test_only_data_leaves_a_slice():
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    mesh = make_mesh(data=2, devices=devices)
    slices = [[d.slice_index for d in row.ravel()] for row in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]
    assert make_mesh(**fsdp_groups(), devices=devices).shape == mesh.shape
    with pytest.raises(UserError, match="mesh.data is 1 on 2 slices"):
        make_mesh(devices=devices)


def test_each_device_gets_its_own_rows_of_a_batch():
    mesh = make_mesh(2, 4)
    batch = jax.device_put(np.arange(16), batch_sharding(mesh))
    rows = sorted(tuple(np.asarray(s.data)) for s in batch.addressable_shards)
    assert rows == [(i, i + 1) for i in range(0, 16, 2)] and num_batch_shards(mesh) == 8


def test_devices_of_a_tensor_axis_share_their_rows():
    mesh = make_mesh(1, -1, 2, jax.devices()[:4])
    batch = jax.device_put(np.arange(8), batch_sharding(mesh))
    assert {s.data.shape for s in batch.addressable_shards} == {(4,)}
    assert num_batch_shards(mesh) == 2


def test_with_shardings_makes_targets_to_restore_into():
    mesh = make_mesh()
    shardings = {"a": replicated(mesh), "b": batch_sharding(mesh)}
    tree = {name: jax.ShapeDtypeStruct((16, 3), np.float32) for name in shardings}
    target = with_shardings(tree, shardings)
    assert target["a"].shape == (16, 3)
    assert {name: leaf.sharding for name, leaf in target.items()} == shardings


def sharding_inside(mesh, x, fn):
    """Returns the sharding that fn gives to an array inside with_mesh() and jit."""
    return jax.jit(with_mesh(mesh, lambda x: fn(2 * x)))(x).sharding


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((8, 3, 4), (("data", "fsdp"), None, "tensor")),
        ((3, 3, 4), (None, None, "tensor")),
    ],
    ids=["divides", "odd"],
)
def test_shard_batch_splits_rows_and_the_axes_named_where_they_divide(shape, spec):
    mesh = make_mesh(1, -1, 2)
    x = jax.device_put(jnp.ones(shape), replicated(mesh))
    sharding = sharding_inside(mesh, x, lambda x: shard_batch(x, None, "tensor"))
    assert sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 3)
    assert jax.jit(shard_batch)(x).sharding.is_fully_replicated  # outside with_mesh()


@pytest.mark.parametrize("axes", [(None, "tensor"), ("tensor", None), ()])
def test_unshard_weight_gathers_all_but_the_axes_named(axes):
    mesh = make_mesh(1, -1, 2)
    pieces = NamedSharding(mesh, PartitionSpec("fsdp"))
    weight = jax.device_put(jnp.ones((8, 6)), pieces)
    sharding = sharding_inside(mesh, weight, lambda w: unshard_weight(w, *axes))
    assert sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*axes)), 2)


def test_nothing_is_stated_where_code_is_written_per_device():
    mesh, rows = make_mesh(), PartitionSpec(("data", "fsdp"))
    per_device = jax.shard_map(shard_batch, mesh=mesh, in_specs=rows, out_specs=rows)
    x = jnp.arange(16.0).reshape(8, 2)
    np.testing.assert_array_equal(jax.jit(with_mesh(mesh, per_device))(x), x)
