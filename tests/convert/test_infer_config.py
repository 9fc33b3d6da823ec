"""What a torch file's shapes, args and flags say about the network and the run."""

import numpy as np
import pytest
from helpers.recorded import case, weights
from helpers.torch_files import golden, loaded, opened, renamed

from sit_jax.config import build, from_json, spec, to_json
from sit_jax.convert import tensor_files
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.infer_config import describe_network, train_args
from sit_jax.convert.state_dict import StateDictSpec
from sit_jax.diffusion import paths, predictions
from sit_jax.diffusion.guidance import GuidanceInterval
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.loss_weights import likelihood_weight, velocity_weight
from sit_jax.errors import UserError
from sit_jax.models.dit import SIZES, SiT
from sit_jax.recipes import published


def shapes_of(name):
    return {key: array.shape for key, array in weights(name).items()}


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


def test_infer_config_reads_the_network_off_the_shapes():
    for name in ("sit_a", "sit_b", "dit_b"):
        config, told = opened(name).config, case(f"{name[:3]}_forward_{name[4:]}")
        model, told = build(config.model), told["model"]
        assert type(model).__name__ == told["cls"]
        assert (model.depth, model.width) == (told["depth"], told["hidden_size"])
        assert (model.patch, model.classes) == (told["patch_size"], told["num_classes"])
        assert model.learn_sigma == told["learn_sigma"]
        assert tuple(config.shape) == (told["input_size"], told["input_size"], 4)
        assert config.batch_size == 256  # all else is the published run's


def test_infer_config_reads_the_run_off_its_args():
    config = opened("train_sit_full").config
    assert (config.batch_size, config.seed, config.save_every) == (6, 2, 20)
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.weight_decay == 0
    assert build(config.process) == Interpolant()
    assert from_json(to_json(config)).model.make is SiT


@pytest.mark.parametrize(
    ("args", "process"),
    [
        (
            dict(path_type="VP", prediction="noise", loss_weight="velocity"),
            dict(
                path=paths.VP(),
                prediction=predictions.noise,
                loss_weight=velocity_weight,
            ),
        ),
        (
            dict(path_type="GVP", prediction="score", loss_weight="likelihood")
            | dict(train_eps=0.01, sample_eps=0.02),
            dict(
                path=paths.gvp,
                prediction=predictions.score,
                loss_weight=likelihood_weight,
                train_eps=0.01,
                sample_eps=0.02,
            ),
        ),
        # The originals ignore both margins here, and the second one there.
        (dict(train_eps=0.01, sample_eps=0.02), {}),
        (
            dict(path_type="VP", sample_eps=0.02, loss_weight="None"),
            dict(path=paths.VP()),
        ),
    ],
)
def test_infer_config_reads_the_process_off_the_args_and_back(tmp_path, args, process):
    weights_ = open_torch_file(renamed(tmp_path, **args), heads=2)
    assert build(weights_.config.process) == Interpolant(**process)
    again = train_args(weights_.config)
    assert again["path_type"] == args.get("path_type", "Linear")
    assert again["prediction"] == args.get("prediction", "velocity")
    assert set(again) == set(vars(loaded(golden("train_sit_full"))["args"]))


def test_train_args_know_no_schedule_of_guidance():
    config = published("sit")
    with config.ignore_type():
        config.guidance = spec(GuidanceInterval, scale=2.5, low=0.2, high=0.8)
    assert train_args(config)["cfg_scale"] == 2.5


def test_train_args_of_dit_have_the_originals_fields():
    theirs = vars(loaded(golden("train_dit_full"))["args"])
    ours = train_args(published("dit"))
    assert set(ours) == set(theirs)
    assert ours["model"] == "DiT-XL/2"
    assert ours["image_size"] == 256


def test_infer_config_takes_a_table_without_a_null_row(tmp_path):
    weights_ = open_torch_file(renamed(tmp_path, num_classes=11), heads=2)
    assert weights_.config.model.classes == 11
    assert weights_.config.model.null_label is False


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (dict(family=None), "add --family sit or --family dit"),
        (dict(heads=None), "divisor of width 40: 1, 2, 4, 5, 8, 10, 20, 40"),
        (dict(heads=3), "--heads 3; add --heads N with a divisor"),
    ],
)
def test_infer_config_asks_for_what_shapes_do_not_tell(flags, told):
    with pytest.raises(UserError, match=told):
        opened("sit_a", **flags)


def test_infer_config_names_both_values_that_disagree(tmp_path):
    with pytest.raises(UserError, match="--family says dit, but .* says sit"):
        opened("train_sit_full", family="dit")
    with pytest.raises(UserError, match="args not understood .*num_classes is 7"):
        open_torch_file(renamed(tmp_path, num_classes=7), heads=2)
    with pytest.raises(UserError, match="args not understood .*'Cosine'"):
        open_torch_file(renamed(tmp_path, path_type="Cosine"), heads=2)


def test_infer_config_refuses_other_heads_than_published(tmp_path):
    released = StateDictSpec(SiT(depth=12, width=384, heads=6, patch=8), (8, 8, 4))
    state = {**released.constants}
    zeros = {n: np.zeros(shape, np.float32) for n, shape in released.trained.items()}
    tensor_files.write(tmp_path / "s.safetensors", state | zeros)
    open_s = lambda **flags: open_torch_file(
        tmp_path / "s.safetensors", family="sit", **flags
    )
    assert open_s().config.model.heads == 6
    with pytest.raises(UserError, match="--heads says 12, but .*384 says 6"):
        open_s(heads=12)


def test_infer_config_keeps_a_config_that_fits():
    c = opened("sit_a").config
    c.batch_size = 3
    assert opened("sit_a", family=None, heads=None, config=c).config.batch_size == 3
    c = opened("sit_c").config
    c.model.classes, c.model.null_label = 5, False
    model = build(opened("sit_c", config=c).config.model)
    assert (model.classes, model.null_label) == (5, False)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("depth", 3, "model.depth is 3, the weights say 2"),
        ("width", 44, "model.width is 44, the weights say 40"),
        ("classes", 1000, "model.classes is 1000, the weights say 10"),
        ("learn_sigma", False, "model.learn_sigma is false, the weights say true"),
        ("heads", 8, "--heads says 4, but --config says 8"),
    ],
)
def test_infer_config_refuses_a_config_that_does_not_fit(field, value, told):
    c = opened("sit_a").config
    c.model[field] = value
    with pytest.raises(UserError, match=told):
        opened("sit_a", config=c)


def test_infer_config_refuses_a_config_of_another_process(tmp_path):
    c = opened("train_sit_full").config
    c.process.path = paths.gvp
    with pytest.raises(UserError, match="process.path.*gvp.*linear"):
        opened("train_sit_full", config=c)
    with pytest.raises(UserError, match="args.model says sit, but --config says dit"):
        open_torch_file(golden("train_sit_full"), config=published("dit"))
