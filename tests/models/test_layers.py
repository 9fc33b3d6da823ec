"""Position and time tables, norms and modulation, against formulas and recordings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import arrays, case, relative

from sit_jax.models import layers


@pytest.mark.parametrize("name", ["g16_d1152", "g32_d1152", "g4_d40"])
def test_position_table_is_the_recorded_one(name):
    golden, table = arrays("pos_embed"), case("pos_embed")["tables"][name]
    ours = layers.sincos_pos_embed_2d(table["grid"], table["dim"])
    assert ours.shape == tuple(table["shape"]) and ours.dtype == np.float32
    rows, spots = golden[f"{name}.rows"], golden[f"{name}.idx"]
    # Both are float64 sines rounded once, so 1e-7 is the rounding of the last bit.
    assert relative(ours[rows], golden[f"{name}.row_values"]) < 1e-7
    assert relative(ours[tuple(spots.T)], golden[f"{name}.idx_values"]) < 1e-7
    whole = ours.astype(np.float64)
    assert relative(whole.sum(0), golden[f"{name}.col_sums_f64"]) < 1e-7
    assert relative(whole.sum(1), golden[f"{name}.row_sums_f64"]) < 1e-7


def test_frequencies_are_within_one_rounding_of_torch():
    theirs, ours = (
        arrays("dit_forward_a")["freqs_f32"],
        layers.timestep_frequencies(128),
    )
    assert ours.dtype == np.float32
    # Torch's vectorised exp is not correctly rounded in 3 of the 128 entries.
    assert np.count_nonzero(ours != theirs) <= 3
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)


def test_time_is_embedded_as_recorded():
    for name, tolerance in (("sit_forward_a", 1e-7), ("dit_forward_a", 3e-6)):
        golden = arrays(name)  # t in [0, 1]; t up to 999, where one ulp is 6e-5
        ours = jax.jit(layers.timestep_embedding)(golden["t"])
        assert relative(ours, golden["t_freq"]) < tolerance, name


def test_gelu_and_its_slope_are_those_of_the_formula():
    """JAX's own slope has no right digit left below -4: 1 + tanh(u) cancels."""
    x = np.linspace(-5, 5, 1001)
    root = np.sqrt(2 / np.pi)
    u, move = root * (x + 0.044715 * x**3), root * (1 + 3 * 0.044715 * x**2)
    half = 1 / (1 + np.exp(-2 * u))  # (1 + tanh(u)) / 2, in float64
    slope = half + 2 * x * half * (1 - half) * move
    given = jnp.asarray(x, jnp.float32)
    assert np.abs(layers.gelu(given) - x * half).max() < 1e-6
    both = [jax.vmap(f(layers.gelu))(given) for f in (jax.grad, jax.jacfwd)]
    for ours in both:
        # near 5, where 1 - s(2 u) has few digits; JAX's own is 3.6e-6 off
        assert np.abs(ours - slope).max() < 2.5e-6
        tail = x < -4
        assert relative(ours[tail], slope[tail]) < 1e-4
    half_as_wide = jax.vmap(jax.grad(layers.gelu))(given.astype(jnp.bfloat16))
    at = np.asarray(given.astype(jnp.bfloat16), np.float64)
    slope = np.interp(at, x, slope)
    # half a unit in the last place of 1.13; JAX's own is 1.6e-2 off
    assert np.abs(np.asarray(half_as_wide, np.float64) - slope).max() < 4.1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_keeps_small_variations_on_a_large_offset(dtype):
    """E[x^2] - E[x]^2 of float32 is off by 3e-4 here, two passes by 6e-6."""
    x = jnp.asarray(np.random.default_rng(0).normal(3000, 30, (4, 40)), dtype)
    wide = np.asarray(x, np.float64)
    exact = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    ours = layers.layer_norm("n").apply({}, x)
    assert ours.dtype == jnp.float32 and relative(ours, exact) < 2e-5


def test_norm_uses_the_biased_variance_and_epsilon_1e_6():
    x = np.array([[1.0, 2.0, 3.0, 6.0]], np.float32) * 1e-3  # variance 3.5e-6
    exact = (x - x.mean()) / np.sqrt(x.astype(np.float64).var() + 1e-6)
    assert relative(layers.layer_norm("n").apply({}, x), exact) < 1e-6


def test_modulation_scale_is_not_rounded_before_one_is_added():
    x, zero = jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1), jnp.bfloat16)
    small = jnp.full((1, 1, 1), 2.0**-10, jnp.bfloat16)  # 1 + 2^-10 is 1 in bfloat16
    assert layers.modulate(x, zero, small).item() == 1 + 2.0**-10
