"""What a training step is compiled with."""

import jax
import jax.numpy as jnp
import pytest

from sit_jax.planning import programs


@pytest.fixture(autouse=True)
def forgotten():
    programs.get_compiler_options.cache_clear()
    yield
    programs.get_compiler_options.cache_clear()


def test_on_a_cpu_single_products_are_not_ynns():
    x = jnp.ones((512, 512))
    compiled = lambda options: (
        jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile().as_text()
    )
    assert "__ynn_fusion" in compiled(None)
    assert "__ynn_fusion" not in compiled(programs.get_compiler_options("cpu"))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_elsewhere_it_is_compiled_as_usual(platform):
    assert programs.get_compiler_options(platform) is None


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    for options in ({"xla_no_such_option": "1"}, {**programs.CPU_OPTIONS, "x": "2"}):
        monkeypatch.setattr(programs, "CPU_OPTIONS", options)
        programs.get_compiler_options.cache_clear()
        assert programs.get_compiler_options("cpu") is None


def test_flags_that_say_so_are_the_users(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert programs.get_compiler_options("cpu") is None
