"""MDT's torch files into checkpoints and back bit by bit, one file or a whole run."""

import re

import jax
import numpy as np
import pytest
import torch
from helpers.recorded import case, weights
from helpers.small import called
from helpers.torch_files import assert_same_state, golden, loaded, stored

from sit_jax import checkpoint
from sit_jax.cli import port_weights
from sit_jax.config import build
from sit_jax.convert import tensor_files
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.rules import to_torch
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.training.optimizers import AdanState

pytestmark = pytest.mark.slow  # together they compile for a minute or two

SUFFIXES = {"mdt1_a": MDT, "mdt2_a": MDTv2}
INDEX = "relative_position_index"


@pytest.mark.parametrize("name", SUFFIXES)
def test_a_released_file_is_known_by_its_names_and_comes_back(name, tmp_path):
    """Heads and, in the second version, the decoder too; buffers in their places."""
    found = open_torch_file(golden(name))
    told, model = case(name.removesuffix("_a"))["model"], build(found.config.model)
    assert type(model) is SUFFIXES[name]
    assert (model.depth, model.heads) == (told["depth"], told["num_heads"])
    assert tuple(found.config.shape) == (8, 8, 4) and model.classes == 9
    assert model.decoder == 2  # of v1 nothing tells: the published value
    there = stored(found, tmp_path / "ck")
    content = there.state_dicts("ema")["ema"]
    for ending in ("pt", "safetensors"):
        path = tmp_path / f"x.{ending}"
        tensor_files.write(path, content)
        back = read_torch_file(path).ema
        assert back[next(n for n in back if n.endswith(INDEX))].dtype == np.int64
    assert_same_state(loaded(tmp_path / "x.pt"), loaded(golden(name)))


RATES = (0.9999, 0.99)
GROUPS = {
    "mdt1_a": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    "mdt2_a": {
        **{"lr": 5e-4, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.0},
        **{"max_grad_norm": 1.0, "no_prox": False, "foreach": True, "fused": True},
        "step": 21,  # a run that was resumed has had one step more than its number says
    },
}


@pytest.fixture(scope="module", params=SUFFIXES)
def run(request, tmp_path_factory):
    """The files that MDT's train script leaves after its step 19."""
    name, folder = request.param, tmp_path_factory.mktemp("run")
    state, rng = loaded(golden(name)), np.random.default_rng(0)
    random = lambda x: torch.from_numpy(rng.normal(size=x.shape).astype(np.float32))
    other = lambda: {n: x if n.endswith(INDEX) else random(x) for n, x in state.items()}
    trained = [x for n, x in state.items() if not n.endswith(INDEX)]
    torch.save(state, folder / "model000019.pt")
    for rate in RATES:
        torch.save(other(), folder / f"ema_{rate}_000019.pt")
    if name == "mdt1_a":
        parameters = [torch.nn.Parameter(x) for x in trained]
        group = {k: v for k, v in GROUPS[name].items() if k != "betas"}
        optimizer = torch.optim.AdamW(parameters, **group, betas=(0.9, 0.999))
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = random(parameter)
            optimizer.step()
        opt = optimizer.state_dict()
    else:
        kinds = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")
        moments = {
            i: {kind: random(x) for kind in kinds} for i, x in enumerate(trained)
        }
        group = {**GROUPS[name], "params": list(moments)}
        opt = {"state": moments, "param_groups": [group]}
    torch.save(opt, folder / "opt000019.pt")
    return name, folder


@pytest.fixture(scope="module")
def there(run, tmp_path_factory):
    found = open_torch_file(run[1] / "model000019.pt")
    return stored(found, tmp_path_factory.mktemp("stored") / "ck")


def test_a_run_becomes_a_checkpoint_of_its_step_with_its_optimizer(run, there):
    name, _ = run
    assert there.weights.step == 20 and there.weights.config.ema_decay == RATES
    group, optimizer = GROUPS[name], there.weights.config.optimizer
    assert optimizer.learning_rate == group["lr"]
    assert (
        tuple(optimizer[f"b{i + 1}"] for i in range(len(group["betas"])))
        == (group["betas"])
    )
    assert there.weights.config.clip == group.get("max_grad_norm")
    names = {"params", "ema", "ema_0.99", "opt_state", "meta"}
    assert names <= checkpoint.items(there.weights.path, 20)


def test_the_moments_are_where_the_optimizer_looks_for_them(run, there):
    """Under our names, in our layout, and torch's count, which is the true one."""
    name, folder = run
    opt = loaded(folder / "opt000019.pt")
    tx = build_experiment(there.weights.config, TRAINING).optimizer
    params = there.ema()
    shapes = jax.eval_shape(tx.init, params)
    state = checkpoint.load(there.weights.path, 20, opt_state=shapes)["opt_state"]
    (ours,) = [x for x in jax.tree.leaves(state, is_leaf=_moments) if _moments(x)]
    assert isinstance(ours, AdanState) == (name == "mdt2_a")
    assert int(ours.count) == (21 if name == "mdt2_a" else 20)
    theirs = {"mdt1_a": dict(mu="exp_avg", nu="exp_avg_sq")}
    theirs["mdt2_a"] = dict(
        mean="exp_avg",
        square="exp_avg_sq",
        change="exp_avg_diff",
        negative="neg_pre_grad",
    )
    for field, kind in theirs[name].items():
        tree = to_torch(there.spec.rules, getattr(ours, field))
        for i, tensor in enumerate(tree.values()):
            np.testing.assert_array_equal(tensor, opt["state"][i][kind])


def _moments(node):
    return hasattr(node, "count") and hasattr(node, "_fields") and len(node) > 1


@pytest.fixture
def port(monkeypatch, capsys):
    """Runs the script here; -> exit code, stdout, stderr."""
    return lambda *words: called(port_weights.main, monkeypatch, capsys, *words)


def test_a_run_goes_out_as_the_files_it_came_in(run, there, tmp_path, port):
    name, folder = run
    code, out, err = port(there.weights.path, tmp_path / "model000019.pt")
    assert (code, err) == (0, "")
    assert re.search(r"^ema_0\.99 +\d+ +\w{64}$", out, re.M)
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names, "model000019.pt.md"]
    )
    for path in names:
        ours, theirs = loaded(tmp_path / path), loaded(folder / path)
        if not path.startswith("opt"):
            assert_same_state(ours, theirs)
            continue
        assert ours["param_groups"] == theirs["param_groups"]
        for i, moments in theirs["state"].items():
            assert ours["state"][i].keys() == moments.keys()
            for kind, tensor in moments.items():
                assert torch.equal(ours["state"][i][kind], tensor)


def test_the_files_of_a_run_are_written_together_or_not_at_all(
    there, tmp_path, port, monkeypatch
):
    (tmp_path / "opt000019.pt").write_text("mine")
    code, _, err = port(there.weights.path, tmp_path / "model000019.pt")
    assert code == 2 and "opt000019.pt exists; --overwrite replaces it" in err
    real = tensor_files.write

    def fails(path, content):
        if path.name.startswith("opt"):
            raise UserError("no space left")
        real(path, content)

    monkeypatch.setattr(tensor_files, "write", fails)
    target = tmp_path / "model000019.pt"
    code, _, err = port(there.weights.path, target, "--overwrite")
    assert code == 2 and "no space left" in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_other_names_get_the_average_alone_or_are_refused(there, tmp_path, port):
    code, out, _ = port(there.weights.path, tmp_path / "x.pt")
    assert code == 0
    assert "the EMA alone, for only a model000019.pt has the run's other files" in out
    code, _, err = port(there.weights.path, tmp_path / "model000020.pt")
    assert code == 2 and "MDT's file of this step is called model000019.pt" in err


def test_weights_of_the_other_version_are_refused_by_both_names(tmp_path, port):
    for name, other in (("mdt1_a", "mdtv2"), ("mdt2_a", "mdt")):
        ours = {"mdt": "mdtv2", "mdtv2": "mdt"}[other]
        config = f"configs/mdt.py:S/2{'+v2' if other == 'mdtv2' else ''}"
        code, _, err = port(golden(name), tmp_path / "ck", "--config", config)
        assert code == 2 and err.count("\n") == 1
        assert re.search(f"{name}.pt.* says {ours}, but --config says {other}$", err)
        code, _, err = port(golden(name), tmp_path / "ck", "--family", "dit")
        assert code == 2 and f"--family says dit, but {golden(name)}" in err
        assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("mask_token"), "missing mask_token$"),
        (
            lambda s: s.update({f"blocks.1.attn.rel_pos_bias.{INDEX}": _moved()}),
            f"blocks.1.*{INDEX} is not the position table of this size but up to 1 off",
        ),
        (lambda s: s.pop("pos_embed"), "not the weights of an MDT: no pos_embed"),
        (lambda s: s.update(extra=np.ones(1, np.float32)), "extra extra$"),
    ],
    ids=["missing", "moved", "untold", "spare"],
)
def test_other_tensors_than_an_mdt_has_are_listed(tmp_path, change, told):
    state = dict(weights("mdt1_a"))
    change(state)
    tensor_files.write(tmp_path / "x.pt", state)
    with pytest.raises(UserError, match=told):
        open_torch_file(tmp_path / "x.pt")


def _moved():
    return weights("mdt1_a")[f"blocks.1.attn.rel_pos_bias.{INDEX}"] + 1


def test_an_average_of_no_rate_is_named(tmp_path):
    for name in ("model000001", "ema_x1_000001"):
        tensor_files.write(tmp_path / f"{name}.pt", dict(weights("mdt1_a")))
    with pytest.raises(UserError, match="'x1' is not the rate of an average"):
        open_torch_file(tmp_path / "model000001.pt")
