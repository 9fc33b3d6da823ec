"""Devices that should hold the same are compared; the one that does not is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from sit_jax.errors import UserError
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import make_mesh, replicated
from sit_jax.trainer.replicas import Replicas

MESH = make_mesh(data=4, fsdp=2)


class State(struct.PyTreeNode):
    step: jax.Array
    params: dict


def state(mesh=MESH):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = {"split": draw(256, 128), "bias": draw(5), "low": jnp.bfloat16(draw(3, 7))}
    params |= {"count": np.int32(3), "flag": np.array([True, False])}
    made = State(np.int32(8), params)
    return jax.device_put(made, sharding_rules.weight_shardings(mesh, made))


def corrupted(array, device):
    """One bit of what one device holds of it is turned over."""
    shards = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.reshape(-1).view(np.uint8)[-1] ^= 1
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


@pytest.fixture(scope="module")
def watch():
    return Replicas(4, state())


@pytest.fixture
def sound():
    return state()


def test_equal_copies_pass(watch, sound):
    watch.check(8, sound)


@pytest.mark.parametrize("device", [0, 5])
@pytest.mark.parametrize("name", ["bias", "low", "count", "flag", "split"])
def test_the_device_that_differs_is_named(watch, sound, name, device):
    """split: two halves on four devices each; the others are whole on all eight."""
    params = {**sound.params, name: corrupted(sound.params[name], device)}
    with pytest.raises(UserError) as error:
        watch.check(8, sound.replace(params=params))
    others = 3 if name == "split" else 7
    assert str(error.value) == (
        f"step 8: cpu:{device} (process 0) holds another copy than {others} other "
        f"devices of params/{name}"
    )


def test_where_no_majority_is_all_are_named(sound):
    mesh = make_mesh(data=2, fsdp=1, devices=jax.devices()[:2])
    two = state(mesh)
    odd = two.replace(step=corrupted(two.step, 1))
    with pytest.raises(UserError, match=r"cpu:0 .*, cpu:1 .* different copies of step"):
        Replicas(1, two).check(3, odd)


def test_it_is_due_every_so_many_steps_where_there_are_copies(watch, sound):
    assert [step for step in range(1, 10) if watch.due(step)] == [4, 8]
    assert not Replicas(0, sound).due(4)
    alone = state(make_mesh(devices=jax.devices()[:1]))
    assert not Replicas(4, alone).due(4)
    Replicas(4, alone).check(4, alone)


def test_a_negative_number_is_refused(sound):
    with pytest.raises(UserError, match="check_replicas is -1"):
        Replicas(-1, sound)


def test_the_sums_are_of_what_each_device_holds():
    where = replicated(MESH)
    held = jax.device_put(np.zeros(4, np.float32), where)
    watch = Replicas(1, State(held, {}))
    watch.check(1, State(held, {}))
    for device in range(8):
        with pytest.raises(UserError, match=f"cpu:{device} "):
            watch.check(1, State(corrupted(held, device), {}))
