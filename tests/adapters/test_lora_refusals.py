"""LoRA's settings that cannot be, and styles to adapt to."""

import jax
import pytest
from helpers import adapters
from helpers.adapters import config

from configs.lora_xl2 import get_config as lora_xl2
from sit_jax.adapters.weights import LABEL_TABLE
from sit_jax.convert.open import WeightsRef, adapter_shapes, base_shapes
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.trainer.loop import train

base = adapters.base


def test_adapters_of_xl_are_33_mb():
    """Of 2.7 GB; the widths are 1152, 3456 and 4608, the depth is 28."""
    parts = build_experiment(lora_xl2())
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    d, rank = 1152, 16
    pairs = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    assert size(adapter_shapes(parts)) == 4 * 28 * rank * sum(map(sum, pairs))
    assert size(adapter_shapes(parts)) == 33_030_144
    assert size(base_shapes(parts)) > 2.69e9


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (dict(rank=0), "rank is 0; it takes a whole number of at least 1"),
        (dict(alpha=0.0), "alpha is 0.0; it takes"),
        (dict(dropout=1.0), "adapter.dropout is 1"),
        (dict(targets="blocks/atn/.*"), "nearest: blocks/attn/"),
        (dict(targets=LABEL_TABLE, dora=True), "is for products"),
        (dict(new_classes=-1), "new_classes is -1; it takes"),
        (dict(new_classes=5), "all of them new"),
    ],
)
def test_settings_that_cannot_be_are_one_line(base, tmp_path, adapter, told):
    with pytest.raises(UserError, match=told) as raised:
        train(config(adapter), tmp_path / "work", WeightsRef(str(base)))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "work").exists()


def test_a_base_of_another_network_is_refused(base, tmp_path):
    for field, told in (("heads", 4), ("depth", 3), ("classes", 6)):
        c = config()
        c.model[field] = told
        with pytest.raises(UserError, match=f"another network: model.{field} is"):
            train(c, tmp_path / "work", WeightsRef(str(base)))
    with pytest.raises(UserError, match="add --init BASE"):
        train(config(), tmp_path / "work")
    with pytest.raises(UserError, match="5 classes .* 8: that makes 3 new ones, but"):
        c = config(dict(new_classes=2))
        c.model.classes = 8
        train(c, tmp_path / "work", WeightsRef(str(base)))
    for name in ("sit-xl2-256", "x.pt"):
        with pytest.raises(UserError, match=f"port_weights.py {name} DIR, or quantize"):
            train(config(), tmp_path / "work", WeightsRef(name))
