"""Torch files into configs and checkpoints, and back bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import small
from helpers.torch_files import (
    assert_same_state,
    broken,
    golden,
    loaded,
    opened,
    stored,
)
from plain_torch import models as plain

from sit_jax.config import spec, to_json
from sit_jax.convert import tensor_files
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.export import CheckpointExport, compare_tensors, flatten_parts
from sit_jax.convert.open import WeightsRef
from sit_jax.convert.optimizer import to_optax
from sit_jax.convert.rules import DIT_RULES, to_torch
from sit_jax.convert.state_dict import StateDictSpec, read_torch_file
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.dit import SiT
from sit_jax.parallel.mesh import make_mesh
from sit_jax.recipes import published
from sit_jax.trainer import resume


@pytest.mark.parametrize("name", ["sit_b", "sit_c", "dit_b"])
def test_export_gives_released_files_back_bit_by_bit(tmp_path, name):
    there = stored(opened(name), tmp_path / "ck")
    assert there.no_optimizer == "the checkpoint has no opt_state"
    content = there.state_dicts("ema")["ema"]
    tensor_files.write(tmp_path / "x.pt", content)
    assert_same_state(loaded(tmp_path / "x.pt"), loaded(golden(name)))


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_export_gives_files_of_train_py_back_bit_by_bit(tmp_path, family):
    there = stored(opened(f"train_{family}_full"), tmp_path / "ck")
    assert there.weights.step == 20
    assert there.no_optimizer is None
    files, _, _ = there.torch_files(tmp_path / "x.pt")
    tensor_files.write(tmp_path / "x.pt", files["x.pt"])
    ours, theirs = loaded(tmp_path / "x.pt"), loaded(golden(f"train_{family}_full"))
    assert list(ours) == list(theirs)
    assert_same_state(ours["model"], theirs["model"])
    assert_same_state(ours["ema"], theirs["ema"])  # whose pos_embed has drifted
    assert ours["args"] == theirs["args"]
    assert ours["opt"]["param_groups"] == theirs["opt"]["param_groups"]
    assert list(ours["opt"]["state"]) == list(theirs["opt"]["state"])
    for i, moments_ in theirs["opt"]["state"].items():
        assert_same_state(ours["opt"]["state"][i], moments_)


def test_torch_weights_load_ema_or_params_on_every_device():
    weights_ = opened("train_sit_full")
    mesh = make_mesh(data=-1, fsdp=1)
    theirs = loaded(golden("train_sit_full"))
    for item, key in (("ema", "ema"), ("params", "model")):
        params = weights_.load(item, build_experiment(weights_.config, TRAINING), mesh)
        kernel = params["cond"]["time_in"]["kernel"]
        np.testing.assert_array_equal(kernel.T, theirs[key]["t_embedder.mlp.0.weight"])
        assert len(kernel.sharding.device_set) == jax.device_count()


def test_training_goes_on_from_a_ported_run(tmp_path):
    weights_ = opened("train_dit_full")
    stored(weights_, tmp_path / "ck")
    parts = build_experiment(weights_.config, TRAINING)
    mesh = make_mesh()
    given = WeightsRef(tmp_path / "ck")
    state, origin, _ = resume.restore_or_init(parts, mesh, 0, tmp_path / "run", given)
    assert "step 20" in origin
    assert int(state.step) == 20
    theirs, adam = loaded(golden("train_dit_full")), state.opt_state[0]
    assert int(adam.count) == 20
    index = list(theirs["model"]).index("final_layer.linear.weight")
    moments_ = theirs["opt"]["state"][index]
    for ours, kind in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        np.testing.assert_array_equal(ours["head"]["out"]["kernel"].T, moments_[kind])


def test_export_of_an_own_run_goes_on_in_torch_as_here(tmp_path):
    """Same gradient, same next weights: moments, their order and the step are right."""
    c = published("sit")
    c.shape, c.clip = (8, 8, 4), 1e9
    c.model = spec(SiT, depth=2, width=16, heads=2, classes=3)
    schedule = spec(optax.linear_schedule, init_value=1e-2, end_value=0.0)
    schedule.transition_steps = 10
    c.optimizer = spec(optax.adamw, learning_rate=schedule, b2=0.99, weight_decay=0.1)
    parts, count = build_experiment(c, TRAINING), 4
    spec_ = StateDictSpec(parts.model, parts.shape)
    rng = np.random.default_rng(0)
    tree = lambda draw: spec_.to_params(
        {n: np.float32(draw(shape)) for n, shape in spec_.trained.items()}
    )
    normal = lambda shape: rng.normal(size=shape)
    params, mu, grads = tree(normal), tree(normal), tree(normal)
    nu = tree(lambda shape: rng.uniform(size=shape))
    state = to_optax(parts.optimizer, params, jnp.int32(count), [mu, nu])
    meta = {"config": to_json(c), "step": 5}  # one more was skipped
    small.save(tmp_path / "ck", 5, meta, params=params, ema=params, opt_state=state)

    export = CheckpointExport(tmp_path / "ck", 5)
    # of Adam and of the schedule, which are one in torch
    assert len(list(export.tensors("step"))) == 1
    files, _, _ = export.torch_files(tmp_path / "x.pt")
    tensor_files.write(tmp_path / "x.pt", files["x.pt"])
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
    gradient = to_torch(DIT_RULES, grads)
    for name, tensor in network.named_parameters():
        if tensor.requires_grad:
            tensor.grad = torch.from_numpy(gradient[name])
    optimizer.step()
    updates, _ = jax.jit(parts.optimizer.update)(grads, state, params)
    ours = to_torch(DIT_RULES, optax.apply_updates(params, updates))
    for name, tensor in network.named_parameters():
        if name in ours:
            # a few roundings of a step of 0.006; another step count moves it by 10 %
            np.testing.assert_allclose(tensor.detach(), ours[name], atol=2e-6)


def test_export_of_other_optimizers_is_the_ema_alone(tmp_path):
    c, weights_ = published("sit"), opened("sit_a")
    c.update({name: weights_.config[name] for name in ("model", "shape")})
    items, meta = weights_.items()
    for make, more in (
        (optax.sgd, {}),
        (optax.radam, {}),
        (optax.adamw, {"nesterov": True}),
    ):
        c.optimizer = spec(make, learning_rate=1e-3, **more)
        state = build_experiment(c, TRAINING).optimizer.init(items["params"])
        meta["config"] = to_json(c)
        directory = tmp_path / make.__name__
        small.save(directory, 0, meta, **items, opt_state=state)
        assert "not plain AdamW" in CheckpointExport(directory, 0).no_optimizer


def test_to_optax_refuses_optimizers_that_keep_more():
    params = {"a": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = optax.chain(optax.scale_by_adam(), optax.trace(0.9))
    with pytest.raises(UserError, match="keeps more than Adam's moments"):
        to_optax(tx, params, 1, [zero, zero])
    with pytest.raises(UserError, match="has 0 parts with Adam's moments"):
        to_optax(optax.sgd(1.0), params, 1, [zero, zero])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "missing blocks.1.mlp.fc2.bias$"),
        (lambda s: s.update(extra=np.ones(2)), "is of another .*: extra extra$"),
        (
            lambda s: s.update({"final_layer.linear.bias": np.ones(31, np.float32)}),
            r"final_layer.linear.bias is \(31,\), not \(32,\)",
        ),
        (lambda s: s.pop("pos_embed"), "not the weights of a DiT or SiT: no pos_embed"),
        (lambda s: s.update(pos_embed=s["pos_embed"][0]), "pos_embed is "),
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
def test_open_torch_file_lists_faults_of_another_architecture(tmp_path, change, told):
    def float32(state):
        change(state)
        state.update({n: np.asarray(x, np.float32) for n, x in state.items()})

    with pytest.raises(UserError, match=told):
        broken(tmp_path, float32)()


def test_export_carries_a_drifted_table(tmp_path):
    drift = np.float32(2e-4)
    open_ = broken(tmp_path, lambda s: s.update(pos_embed=s["pos_embed"] + drift))
    ema = stored(open_(), tmp_path / "ck").state_dicts("ema")["ema"]
    read = read_torch_file(tmp_path / "x.pt")
    np.testing.assert_array_equal(ema["pos_embed"], read.ema["pos_embed"])


def test_open_torch_file_refuses_an_optimizer_of_fewer_tensors(tmp_path):
    content = loaded(golden("train_sit_full"))
    del content["opt"]["state"][7]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not the state of all trained"):
        open_torch_file(tmp_path / "x.pt", heads=2)


def test_state_dict_spec_of_xl_has_the_published_tensors():
    spec_ = StateDictSpec(SiT(), (32, 32, 4))
    assert len(spec_.trained) == 291
    assert sum(np.prod(shape) for shape in spec_.trained.values()) == 674_834_720


def test_compare_tensors_sees_one_bit():
    a = {"x": np.ones(3, np.float32), "y": np.zeros((2, 2), np.float32)}
    b = a | {"x": np.nextafter(a["x"], 2, dtype=np.float32)}
    ours = lambda state: flatten_parts({"ema": state})
    swapped = dict(reversed(a.items()))
    assert compare_tensors(ours(a), {"ema": swapped}) == compare_tensors(
        ours(swapped), {"ema": a}
    )
    for other, name in ((b, "x"), (a | {"y": -a["y"]}, "y")):
        with pytest.raises(UserError, match=f"ema: {name} came back different"):
            compare_tensors(ours(a), {"ema": other})
    with pytest.raises(UserError, match="1 tensors came back of 2"):
        compare_tensors(ours({"x": a["x"]}), {"ema": a})
