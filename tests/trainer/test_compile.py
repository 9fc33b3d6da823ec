"""Compiled programs found again, copies compared, and memory that is kept."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from helpers import ROOT

from sit_jax.convert import pretrained
from sit_jax.errors import UserError
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import make_mesh
from sit_jax.trainer.compile import ReplicaCheck, use_compilation_cache

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
    return ReplicaCheck(4, state())


@pytest.fixture
def sound():
    return state()


@pytest.mark.parametrize("device", [0, 5])
@pytest.mark.parametrize("name", ["bias", "low", "count", "flag", "split"])
def test_the_device_that_differs_is_named(watch, sound, name, device):
    """split: two halves on four devices each; the others are whole on all eight."""
    params = {**sound.params, name: corrupted(sound.params[name], device)}
    with pytest.raises(UserError) as error:
        watch.check(8, sound.replace(params=params))
    others = 3 if name == "split" else 7
    assert str(error.value) == (
        f"step 8: cpu:{device} (process 0) and {others} other devices hold different "
        f"copies of params/{name}"
    )


def test_it_is_due_every_so_many_steps_where_there_are_copies(watch, sound):
    assert [step for step in range(1, 10) if watch.is_due(step)] == [4, 8]
    watch.check(8, sound)
    assert not ReplicaCheck(0, sound).is_due(4)
    alone = state(make_mesh(devices=jax.devices()[:1]))
    assert not ReplicaCheck(4, alone).is_due(4)
    ReplicaCheck(4, alone).check(4, alone)


SCRIPT = """
import jax, jax.numpy as jnp
from sit_jax.trainer.compile import use_compilation_cache
use_compilation_cache()
hits = []
hear = lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
jax.monitoring.register_event_listener(hear)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
for n in (2, 3, 2):
    step = jax.jit(lambda x: jnp.sin(x) * n)
    before = len(hits)
    program = step.lower(1.0).compile()
    assert abs(float(program(1.0)) - n * 0.8414710) < 1e-6
    print(len(hits) > before)
"""


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    printed = []
    for _ in range(2):
        run = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
        printed += done.stdout.split("\n")[:-1]
    assert printed == ["False", "False", *["True"] * 4]
    assert list((tmp_path / ".cache" / "sit_jax").iterdir())


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_variable_names_the_cache_or_none(unset, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("", str(tmp_path / "file" / "cache")):  # none, and no place for it
        use_compilation_cache({"SIT_JAX_CACHE": folder})
        assert jax.config.jax_compilation_cache_dir is None
    use_compilation_cache({"SIT_JAX_CACHE": str(tmp_path / "cache")})
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")


def test_nor_without_a_home(unset, monkeypatch):
    """As of a container's user whom nobody knows."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    use_compilation_cache({})
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("SIT_JAX_CACHE", raising=False)
    with pytest.raises(UserError, match="no home folder .* SIT_JAX_CACHE"):
        pretrained.cache_dir()


def test_a_folder_given_to_jax_itself_counts(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    use_compilation_cache({"SIT_JAX_CACHE": str(tmp_path / "ours")})
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax")
    assert not (tmp_path / "ours").exists()
