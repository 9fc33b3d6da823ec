"""How large the networks are, how they start, and reading that off their weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import quick_jit, shapes, traced_macs
from helpers.recorded import arrays, case, relative

from sit_jax.convert.rules import DIT_RULES, to_torch, torch_constants
from sit_jax.models.dit import SIZES, DiT, SiT
from sit_jax.models.flops import forward_macs

# Parameters as train.py logs them (with the position table): at 256 pixels, of these
# trainable, at 256 without sigma, at 512; then 1e9 multiply-adds at 256 and 512.
PUBLISHED = {
    "XL/2": (675129632, 674834720, 675111184, 676014368, 118.62, 524.54),
    "XL/4": (675074432, 675000704, 675000640, 675295616, 29.04, 118.66),
    "XL/8": (675683072, 675664640, 675387904, 675738368, 7.39, 29.09),
    "L/2": (458102816, 457840672, 458086416, 458889248, 80.70, 360.98),
    "L/4": (458053760, 457988224, 457988160, 458250368, 19.70, 80.74),
    "L/8": (458594816, 458578432, 458332416, 458643968, 5.01, 19.73),
    "B/2": (130512416, 130315808, 130500112, 131102240, 23.01, 106.38),
    "B/4": (130475648, 130426496, 130426432, 130623104, 5.57, 23.03),
    "B/8": (130881536, 130869248, 130684672, 130918400, 1.42, 5.59),
    "S/2": (32963360, 32865056, 32957200, 33258272, 6.06, 31.44),
    "S/4": (32945024, 32920448, 32920384, 33018752, 1.41, 6.07),
    "S/8": (33148160, 33142016, 33049600, 33166592, 0.36, 1.43),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    size, patch = name.split("/")
    logged, trainable, plain, large, gmacs, large_gmacs = PUBLISHED[name]
    model = SiT(**SIZES[size], patch=int(patch))
    count = lambda m: sum(s.size for s in jax.tree.leaves(shapes(m)))
    fixed = lambda side: torch_constants(model, side)["pos_embed"].size
    assert count(model) == trainable == logged - fixed(32) == large - fixed(64)
    assert count(model.clone(learn_sigma=False)) + fixed(32) == plain
    for side, published in ((32, gmacs), (64, large_gmacs)):
        assert abs(forward_macs(model, (side, side, 4)) / 1e9 - published) <= 0.0051


def test_macs_are_those_of_the_products_in_the_program():
    """Counted from the traced products, with another ratio and an odd class count."""
    model = DiT(depth=1, width=24, heads=3, mlp_ratio=2.5, patch=4, classes=3)
    x, t, y = jnp.ones((1, 8, 8, 4)), jnp.ones(1), jnp.ones(1, int)
    run = lambda p: model.apply({"params": p}, x, t, y)
    assert traced_macs(run, shapes(model, 8)) == forward_macs(model, (8, 8, 4))


# name ends -> half-width of a uniform or standard deviation of a normal distribution.
XAVIER = lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out))
NORMAL = ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "table.weight")
UNIFORM = (
    "x_embedder.proj.weight",
    "qkv.weight",
    "attn.proj.weight",
    "fc1.weight",
    "fc2.weight",
)


@pytest.mark.parametrize("index", [0, 1])
def test_initial_weights_are_distributed_as_recorded(index):
    """Per layer; widths 192 give 3e3 to 2e5 values each."""
    golden = case("init_stats")["models"][index]
    stats = arrays("init_stats")[golden["cls"]]
    k = golden["kwargs"]
    model = {"SiT": SiT, "DiT": DiT}[golden["cls"]](
        depth=k["depth"],
        width=k["hidden_size"],
        heads=k["num_heads"],
        patch=k["patch_size"],
        classes=k["num_classes"],
    )
    state = torch_constants(model, k["input_size"]) | initial_state(
        model, k["input_size"]
    )
    assert list(state) == golden["names"]
    assert [list(a.shape) for a in state.values()] == golden["shapes"]
    for (name, ours), (n, mean, std, largest, _) in zip(
        state.items(), stats, strict=True
    ):
        flat = ours.reshape(len(ours), -1)
        assert ours.dtype == np.float32 and ours.size == n
        if name == "pos_embed":
            assert ours.mean() == pytest.approx(mean, rel=1e-6)
        elif name.endswith(UNIFORM):
            bound = XAVIER(flat.shape[1], flat.shape[0])
            # The largest of n falls short of the bound by bound * 7 / n once in 1000.
            assert bound * (1 - 7 / n) < np.abs(ours).max() <= bound * (1 + 1e-6)
            assert largest <= bound * (1 + 1e-6)
        elif not name.endswith(NORMAL):
            assert not ours.any() and std == 0
        # Five standard errors of the mean and of the deviation, ours and theirs.
        assert abs(ours.mean() - mean) <= 5 * math.sqrt(2 / n) * std + 1e-6
        assert abs(ours.std(ddof=1) - std) <= 5 * math.sqrt(1 / n) * std + 1e-6
    for name in ("attn.qkv.weight", "mlp.fc2.weight"):
        a, b = (state[f"blocks.{i}.{name}"] for i in (0, 1))
        assert relative(a, b) > 1  # independent draws, not one repeated


def initial_state(model, side):
    x = jnp.zeros((1, side, side, 4))
    init = quick_jit(model.init)
    params = init(jax.random.key(7), x, jnp.zeros(1), jnp.zeros(1, int))["params"]
    return to_torch(DIT_RULES, params)
