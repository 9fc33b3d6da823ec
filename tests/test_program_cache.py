"""Programs found again on disk, and where that is."""

import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from sit_jax.convert import releases
from sit_jax.errors import UserError
from sit_jax.trainer import program_cache

SCRIPT = """
import jax, jax.numpy as jnp
from sit_jax import program_cache
program_cache.begin()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
for n in (2, 3, 2):
    step = jax.jit(lambda x: jnp.sin(x) * n)
    program, words = program_cache.compiled(lambda: step.lower(1.0))
    assert abs(float(program(1.0)) - n * 0.8414710) < 1e-6
    print(words.partition("(")[2])
"""


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    def told(folder):
        env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
        env |= {} if folder is None else {"SIT_JAX_CACHE": str(folder)}
        run = [sys.executable, "-c", SCRIPT]
        found = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
        return found.stdout.split("\n")[:-1]

    usual, other = tmp_path / ".cache" / "sit_jax", tmp_path / "other"
    miss, hit = f"not found in {usual})", f"found in {usual})"
    assert told(None) == [miss, miss, hit]
    assert told(None) == [hit, hit, hit]
    assert told(other)[0] == f"not found in {other})"
    assert told("") == ["no compilation cache)"] * 3


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_without_a_place_for_it_there_is_no_cache(unset, tmp_path):
    (tmp_path / "file").touch()
    program_cache.begin({"SIT_JAX_CACHE": str(tmp_path / "file" / "cache")})
    assert jax.config.jax_compilation_cache_dir is None


def test_nor_without_a_home(unset, monkeypatch):
    """As of a container's user whom nobody knows."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    program_cache.begin({})
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("SIT_JAX_CACHE", raising=False)
    with pytest.raises(UserError, match="no home folder .* SIT_JAX_CACHE"):
        releases.cache()


def test_a_folder_given_to_jax_itself_counts(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    program_cache.begin({"SIT_JAX_CACHE": str(tmp_path / "ours")})
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax")
    assert not (tmp_path / "ours").exists()
