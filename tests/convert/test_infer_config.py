"""What a torch file's shapes, args and flags say about the network and the run."""

import pytest
from networks import recorded_model
from recorded import case, weights

from sit_jax.convert.infer_config import describe_network
from sit_jax.convert.state_dict import StateDictSpec
from sit_jax.errors import UserError
from sit_jax.models.dit import SIZES, SiT


def shapes_of(name):
    return {key: array.shape for key, array in weights(name).items()}


@pytest.mark.parametrize("name", ["sit_forward_b", "dit_forward_a"])
def test_describe_network_reads_recorded_networks(name):
    fields, model = (
        describe_network(shapes_of(name.replace("_forward", ""))),
        recorded_model(name),
    )
    for field in ("depth", "width", "patch", "mlp_ratio", "classes", "learn_sigma"):
        assert fields[field] == getattr(model, field), field
    assert fields["side"] == case(name)["model"]["input_size"]
    assert fields["channels"] == 4 and fields["heads"] is None


def test_describe_network_knows_heads_of_published_sizes():
    for size in SIZES.values():
        for depth, heads in ((size["depth"], size["heads"]), (size["depth"] + 1, None)):
            sizes = size | dict(depth=depth, patch=8, classes=3, learn_sigma=False)
            spec = StateDictSpec(SiT(**sizes), (16, 16, 4))
            constants = {name: x.shape for name, x in spec.constants.items()}
            fields = describe_network(constants | spec.trained)
            assert fields["heads"] == heads and fields["depth"] == depth
            assert fields["side"] == 16 and fields["learn_sigma"] is False


def test_describe_network_assumes_a_null_row():
    """Five classes without a null label look like four with one."""
    assert describe_network(shapes_of("sit_c"))["classes"] == 4


def test_describe_network_refuses_other_weights():
    shapes = shapes_of("sit_a") | {"final_layer.linear.weight": (12, 40)}
    with pytest.raises(UserError, match="3 channels for 4"):
        describe_network(shapes)
    with pytest.raises(UserError, match="not the weights.*pos_embed"):
        describe_network({"conv1.weight": (64, 3, 7, 7)})
