"""Torch files into configs and checkpoints, and back bit by bit."""

import argparse
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import torch
from plain_torch import models as plain
from recorded import FOLDER, arrays, case, nchw, nhwc, relative, weights

from sit_jax import (
    checkpoint,
    comparison,
    moments,
    paths,
    port,
    predictions,
    sharding,
    start,
    tensor_files,
    torch_files,
)
from sit_jax.config import build, from_json, spec, to_json
from sit_jax.errors import UserError
from sit_jax.exchange import Stored, open_torch
from sit_jax.guidance import Interval
from sit_jax.interpolant import Interpolant, likelihood_weight, velocity_weight
from sit_jax.models.dit import RULES, SiT
from sit_jax.recipe import recipe
from sit_jax.released import Released
from sit_jax.torch_config import args_of


def base(family):
    return importlib.import_module(f"configs.{family}_xl2").get_config()


def golden(name):
    return FOLDER / "weights" / f"{name}.pt"


def opened(name, **flags):
    """The weights of tests/golden, with what their shapes do not tell."""
    if "full" in name:
        return open_torch(golden(name), base, heads=2, **flags)
    model = case(f"{name[:3]}_forward_{name[4:]}")["model"]
    flags = {"family": name[:3], "heads": model["num_heads"]} | flags
    return open_torch(golden(name), base, **flags)


def stored(weights, directory):
    """What a checkpoint of these weights gives when it is opened."""
    items, meta = weights.items()
    small.save(directory, meta["step"], meta, **items)
    return Stored(*checkpoint.find(directory))


def loaded(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name
        assert one[name].dtype == other[name].dtype
        assert one[name].is_contiguous()


@pytest.mark.parametrize("name", ["sit_a", "sit_b", "sit_c", "dit_a", "dit_b"])
def test_released_files_come_back_bit_by_bit_in_their_order(tmp_path, name):
    there = stored(opened(name), tmp_path / "ck")
    assert there.no_moments == "the checkpoint has no opt_state"
    content, _ = there.content(bare=True)
    tensor_files.write(tmp_path / "x.pt", content)
    assert_same_state(loaded(tmp_path / "x.pt"), loaded(golden(name)))


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_files_of_train_py_come_back_bit_by_bit(tmp_path, family):
    there = stored(opened(f"train_{family}_full"), tmp_path / "ck")
    assert there.step == 20
    assert there.no_moments is None
    content, _ = there.content(bare=False)
    tensor_files.write(tmp_path / "x.pt", content)
    ours, theirs = loaded(tmp_path / "x.pt"), loaded(golden(f"train_{family}_full"))
    assert list(ours) == list(theirs)
    assert_same_state(ours["model"], theirs["model"])
    assert_same_state(ours["ema"], theirs["ema"])  # whose pos_embed has drifted
    assert ours["args"] == theirs["args"]
    assert ours["opt"]["param_groups"] == theirs["opt"]["param_groups"]
    assert list(ours["opt"]["state"]) == list(theirs["opt"]["state"])
    for i, moments_ in theirs["opt"]["state"].items():
        assert_same_state(ours["opt"]["state"][i], moments_)


def test_a_ported_checkpoint_computes_what_torch_did(tmp_path):
    there, recorded = stored(opened("sit_a"), tmp_path / "ck"), arrays("sit_forward_a")
    out = there.released.model.apply(
        {"params": there.ema()}, nhwc(recorded["x"]), recorded["t"], recorded["y"]
    )
    # float32 rounding through two blocks; a swapped axis gives 1
    assert relative(nchw(out), recorded["out"]) < 2e-6


def test_sampling_loads_average_or_model_on_every_device():
    weights_ = opened("train_sit_full")
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    theirs = loaded(golden("train_sit_full"))
    for item, key in (("ema", "ema"), ("params", "model")):
        params = weights_.load(item, recipe(weights_.config), mesh)
        kernel = params["cond"]["time_in"]["kernel"]
        np.testing.assert_array_equal(kernel.T, theirs[key]["t_embedder.mlp.0.weight"])
        assert len(kernel.sharding.device_set) == jax.device_count()


def test_training_goes_on_from_a_ported_run(tmp_path):
    weights_ = opened("train_dit_full")
    stored(weights_, tmp_path / "ck")
    parts = recipe(weights_.config)
    mesh = sharding.make_mesh()
    state, origin = start.begin(parts, mesh, 0, tmp_path / "run", tmp_path / "ck")
    assert "step 20" in origin
    assert int(state.step) == 20
    theirs, adam = loaded(golden("train_dit_full")), state.opt_state[0]
    assert int(adam.count) == 20
    index = list(theirs["model"]).index("final_layer.linear.weight")
    moments_ = theirs["opt"]["state"][index]
    for ours, kind in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        np.testing.assert_array_equal(ours["head"]["out"]["kernel"].T, moments_[kind])


def test_an_own_run_goes_on_in_torch_as_here(tmp_path):
    """Same gradient, same next weights: moments, their order and the step are right."""
    c = base("sit")
    c.shape, c.clip = (8, 8, 4), 1e9
    c.model = spec(SiT, depth=2, width=16, heads=2, classes=3)
    schedule = spec(optax.linear_schedule, init_value=1e-2, end_value=0.0)
    schedule.transition_steps = 10
    c.optimizer = spec(optax.adamw, learning_rate=schedule, b2=0.99, weight_decay=0.1)
    parts, count = recipe(c), 4
    released = Released(parts.model, parts.shape)
    rng = np.random.default_rng(0)
    tree = lambda draw: released.tree(
        {n: np.float32(draw(shape)) for n, shape in released.trained.items()}
    )
    normal = lambda shape: rng.normal(size=shape)
    params, mu, grads = tree(normal), tree(normal), tree(normal)
    nu = tree(lambda shape: rng.uniform(size=shape))
    state = moments.place(parts.tx, params, jnp.int32(count), mu, nu)
    meta = {"config": to_json(c), "step": 5}  # one more was skipped
    small.save(tmp_path / "ck", 5, meta, params=params, ema=params, opt_state=state)

    steps = [each for each in Stored(tmp_path / "ck", 5).tensors("step")]
    assert len(steps) == 1  # of Adam and of the schedule, which are one in torch
    content, _ = Stored(tmp_path / "ck", 5).content(bare=False)
    tensor_files.write(tmp_path / "x.pt", content)
    file = loaded(tmp_path / "x.pt")
    group = file["opt"]["param_groups"][0]
    assert group["lr"] == pytest.approx(6e-3)  # of step 4
    assert group["weight_decay"] == 0.1
    network = plain.SiT(
        input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=3
    )
    network.load_state_dict(file["model"], strict=True)
    assert list(network.state_dict()) == list(file["model"])
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.load_state_dict(file["opt"])
    gradient = port.to_torch(RULES, grads)
    for name, tensor in network.named_parameters():
        if tensor.requires_grad:
            tensor.grad = torch.from_numpy(gradient[name])
    optimizer.step()
    updates, _ = jax.jit(parts.tx.update)(grads, state, params)
    ours = port.to_torch(RULES, optax.apply_updates(params, updates))
    for name, tensor in network.named_parameters():
        if name in ours:
            # a few roundings of a step of 0.006; another step count moves it by 10 %
            np.testing.assert_allclose(tensor.detach(), ours[name], atol=2e-6)


def test_other_optimizers_leave_the_average_alone(tmp_path):
    c, weights_ = base("sit"), opened("sit_a")
    c.update({name: weights_.config[name] for name in ("model", "shape")})
    items, meta = weights_.items()
    for make, more in (
        (optax.sgd, {}),
        (optax.radam, {}),
        (optax.adamw, {"nesterov": True}),
    ):
        c.optimizer = spec(make, learning_rate=1e-3, **more)
        state = recipe(c).tx.init(items["params"])
        meta["config"] = to_json(c)
        directory = tmp_path / make.__name__
        small.save(directory, 0, meta, **items, opt_state=state)
        assert "not plain AdamW" in Stored(directory, 0).no_moments


def test_moments_need_an_optimizer_that_keeps_nothing_else():
    params = {"a": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = optax.chain(optax.scale_by_adam(), optax.trace(0.9))
    with pytest.raises(UserError, match="keeps more than Adam's moments"):
        moments.place(tx, params, 1, zero, zero)
    with pytest.raises(UserError, match="has 0 parts with Adam's moments"):
        moments.place(optax.sgd(1.0), params, 1, zero, zero)


def test_the_network_is_read_off_the_shapes():
    for name in ("sit_a", "sit_b", "dit_b"):
        config, told = opened(name).config, case(f"{name[:3]}_forward_{name[4:]}")
        model, told = build(config.model), told["model"]
        assert type(model).__name__ == told["cls"]
        assert (model.depth, model.width) == (told["depth"], told["hidden_size"])
        assert (model.patch, model.classes) == (told["patch_size"], told["num_classes"])
        assert model.learn_sigma == told["learn_sigma"]
        assert tuple(config.shape) == (told["input_size"], told["input_size"], 4)
        assert config.batch_size == 256  # all else is the published run's


def test_the_run_is_read_off_its_args():
    config = opened("train_sit_full").config
    assert (config.batch_size, config.seed, config.save_every) == (6, 2, 20)
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.weight_decay == 0
    assert build(config.process) == Interpolant()
    assert from_json(to_json(config)).model.make is SiT


def renamed(tmp_path, **changes):
    """train_sit_full.pt with other args."""
    content = loaded(golden("train_sit_full"))
    for name, value in changes.items():
        setattr(content["args"], name, value)
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize(
    ("args", "process"),
    [
        (
            dict(path_type="VP", prediction="noise", loss_weight="velocity"),
            dict(path=paths.VP(), predicts=predictions.noise, weight=velocity_weight),
        ),
        (
            dict(path_type="GVP", prediction="score", loss_weight="likelihood")
            | dict(train_eps=0.01, sample_eps=0.02),
            dict(
                path=paths.gvp,
                predicts=predictions.score,
                weight=likelihood_weight,
                train_margin=0.01,
                sample_margin=0.02,
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
def test_the_process_is_read_off_the_args_and_back(tmp_path, args, process):
    weights_ = open_torch(renamed(tmp_path, **args), base, heads=2)
    assert build(weights_.config.process) == Interpolant(**process)
    again = args_of(weights_.config)
    assert again["path_type"] == args.get("path_type", "Linear")
    assert again["prediction"] == args.get("prediction", "velocity")
    assert set(again) == set(vars(loaded(golden("train_sit_full"))["args"]))


def test_args_know_no_schedule_of_guidance():
    config = base("sit")
    with config.ignore_type():
        config.guidance = spec(Interval, scale=2.5, low=0.2, high=0.8)
    assert args_of(config)["cfg_scale"] == 2.5


def test_args_of_dit_have_the_originals_fields():
    theirs = vars(loaded(golden("train_dit_full"))["args"])
    ours = args_of(base("dit"))
    assert set(ours) == set(theirs)
    assert ours["model"] == "DiT-XL/2"
    assert ours["image_size"] == 256


def test_a_table_without_a_null_row_is_told_by_num_classes(tmp_path):
    weights_ = open_torch(renamed(tmp_path, num_classes=11), base, heads=2)
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
def test_what_shapes_do_not_tell_is_asked(flags, told):
    with pytest.raises(UserError, match=told):
        opened("sit_a", **flags)


def test_flags_and_files_that_disagree_are_named_with_both_values(tmp_path):
    with pytest.raises(UserError, match="--family says dit, but .* says sit"):
        opened("train_sit_full", family="dit")
    with pytest.raises(UserError, match="args not understood .*num_classes is 7"):
        open_torch(renamed(tmp_path, num_classes=7), base, heads=2)
    with pytest.raises(UserError, match="args not understood .*'Cosine'"):
        open_torch(renamed(tmp_path, path_type="Cosine"), base, heads=2)


def test_published_heads_cannot_be_overruled_by_a_flag(tmp_path):
    released = Released(SiT(depth=12, width=384, heads=6, patch=8), (8, 8, 4))
    state = {**released.constants}
    zeros = {n: np.zeros(shape, np.float32) for n, shape in released.trained.items()}
    tensor_files.write(tmp_path / "s.safetensors", state | zeros)
    open_s = lambda **flags: open_torch(
        tmp_path / "s.safetensors", base, family="sit", **flags
    )
    assert open_s().config.model.heads == 6
    with pytest.raises(UserError, match="--heads says 12, but .*384 says 6"):
        open_s(heads=12)


def test_a_config_is_kept_if_it_fits():
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
def test_a_config_that_does_not_fit_is_refused_with_both_values(field, value, told):
    c = opened("sit_a").config
    c.model[field] = value
    with pytest.raises(UserError, match=told):
        opened("sit_a", config=c)


def test_a_config_of_another_process_or_family_is_refused(tmp_path):
    c = opened("train_sit_full").config
    c.process.path = paths.gvp
    with pytest.raises(UserError, match="process.path.*gvp.*linear"):
        opened("train_sit_full", config=c)
    with pytest.raises(UserError, match="args.model says sit, but --config says dit"):
        open_torch(golden("train_sit_full"), base, config=base("dit"))


def broken(tmp_path, change):
    state = dict(weights("sit_a"))
    change(state)
    tensor_files.write(tmp_path / "x.pt", state)
    return lambda: open_torch(tmp_path / "x.pt", base, family="sit", heads=4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "missing: blocks.1.mlp.fc2.bias$"),
        (lambda s: s.update(extra=np.ones(2)), "holds another .*; spare: extra$"),
        (
            lambda s: s.update({"final_layer.linear.bias": np.ones(31, np.float32)}),
            r"misshapen: final_layer.linear.bias \(31,\) instead of \(32,\)",
        ),
        (lambda s: s.pop("pos_embed"), "not the weights of a DiT or SiT: no pos_embed"),
        (lambda s: s.update(pos_embed=s["pos_embed"][0]), "misshapen: pos_embed"),
        (
            lambda s: s.update({"x_embedder.proj.weight": np.ones((40, 16))}),
            "x.pt: not the weights of a DiT or SiT$",
        ),
        (lambda s: s.update(pos_embed=-s["pos_embed"]), "pos_embed is not the sine"),
        (
            lambda s: s.update(pos_embed=s["pos_embed"] * np.float32("nan")),
            "pos_embed is not the sine-cosine table of this size",
        ),
    ],
)
def test_weights_of_another_architecture_are_listed(tmp_path, change, told):
    def float32(state):
        change(state)
        state.update({n: np.asarray(x, np.float32) for n, x in state.items()})

    with pytest.raises(UserError, match=told):
        broken(tmp_path, float32)()


def test_a_drifted_table_is_carried_and_not_rounded_away(tmp_path):
    drift = np.float32(2e-4)
    open_ = broken(tmp_path, lambda s: s.update(pos_embed=s["pos_embed"] + drift))
    content, _ = stored(open_(), tmp_path / "ck").content(bare=True)
    read = torch_files.read(tmp_path / "x.pt")
    np.testing.assert_array_equal(content["pos_embed"], read.ema["pos_embed"])


def test_an_optimizer_of_fewer_tensors_is_refused(tmp_path):
    content = loaded(golden("train_sit_full"))
    del content["opt"]["state"][7]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not the state of all trained"):
        open_torch(tmp_path / "x.pt", base, heads=2)


def test_xl_has_the_published_tensors():
    released = Released(SiT(), (32, 32, 4))
    assert len(released.trained) == 291
    assert sum(np.prod(shape) for shape in released.trained.values()) == 674_834_720


def test_a_difference_of_one_bit_is_seen():
    a = {"x": np.ones(3, np.float32), "y": np.zeros((2, 2), np.float32)}
    b = a | {"x": np.nextafter(a["x"], 2, dtype=np.float32)}
    each = lambda state: (("ema", name, array) for name, array in state.items())
    same = comparison.compare(each(a), {"ema": dict(reversed(a.items()))})["ema"]
    assert (same.tensors, same.difference, same.left == same.right) == (2, 0, True)
    other = comparison.compare(each(a), {"ema": b})["ema"]
    assert other.left != other.right
    assert other.difference == pytest.approx(1.2e-7, rel=0.01)
    minus = comparison.compare(each(a), {"ema": a | {"y": -a["y"]}})["ema"]
    assert (minus.difference, minus.left == minus.right) == (0, False)
    with pytest.raises(UserError, match="1 tensors came back of 2"):
        comparison.compare(each({"x": a["x"]}), {"ema": a})
