"""Weights of one network as the beginning of another: what is taken, what is new."""

import functools
import json

import jax
import numpy as np
import photographs
import pytest
import small
from flax.traverse_util import flatten_dict
from networks import quick_jit
from recorded import FOLDER

import sample
import train
from sit_jax import checkpoint
from sit_jax.config import load, spec, to_json
from sit_jax.convert.exchange import open_torch
from sit_jax.data.folders import ImageFolder
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.dit import DiT
from sit_jax.parallel.mesh import make_mesh
from sit_jax.samplers.ddpm import DDIM
from sit_jax.trainer import start
from sit_jax.training.state import create_train_state, init_params

TABLE = "cond/label/embedding"


def config(classes=10, kind=None, **fields):
    c = small.config(**fields)
    if kind is DiT:
        c.model = spec(DiT, **{k: v for k, v in c.model.items() if k != "make"})
        c.process = spec(GaussianDiffusion)
        c.sampler = spec(DDIM, steps=2)
    c.model.classes = classes
    return c


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A checkpoint of 1,000 classes without an optimizer, as a ported one."""
    return small.checkpoint(tmp_path_factory.mktemp("thousand"), config(1000))


def begun(c, given, monkeypatch, **more):
    monkeypatch.setattr(jax, "jit", quick_jit)
    return start.begin(
        build_experiment(c, TRAINING), make_mesh(), 3, "nowhere", given, **more
    )


def flat(tree):
    return {k: np.asarray(v) for k, v in flatten_dict(tree, sep="/").items()}


def given(directory, item):
    opened = start.open_weights(directory, None)
    return flat(
        opened.load(item, build_experiment(opened.config, TRAINING), make_mesh(-1, 1))
    )


def test_of_other_classes_only_the_label_table_is_new(thousand, monkeypatch):
    state, told = begun(config(10), thousand, monkeypatch)
    for item in ("params", "ema"):
        old, new = given(thousand, item), flat(getattr(state, item))
        assert old.keys() == new.keys()
        rest = {name: np.array_equal(old[name], new[name]) for name in old}
        assert {name for name, same in rest.items() if not same} == {TABLE}
        assert new[TABLE].shape == (11, 16)
        np.testing.assert_array_equal(new[TABLE][10], old[TABLE][1000])  # the null row
    fresh = init_params(
        build_experiment(config(10), TRAINING).model, (4, 4, 1), jax.random.key(3)
    )
    np.testing.assert_allclose(
        state.params["cond"]["label"]["embedding"][:10],
        fresh["cond"]["label"]["embedding"][:10],
        rtol=1e-6,
    )
    assert int(state.step) == 0 and not int(state.opt_state[0].count)
    assert f"only {TABLE} (11, 16) is new, for 10 classes instead of 1000" in told
    assert "null label 10" in told


def test_another_resolution_takes_every_parameter(thousand, monkeypatch):
    larger = config(1000, shape=(8, 8, 1))
    state, told = begun(larger, thousand, monkeypatch)
    for item in ("params", "ema"):
        old, new = given(thousand, item), flat(getattr(state, item))
        assert old.keys() == new.keys()
        assert all(np.array_equal(old[name], new[name]) for name in old)
    assert "positions of 8 x 8 instead of 4 x 4" in told and "is new" not in told


def test_the_published_512_network_has_the_parameters_of_256():
    def shapes(name):
        parts = build_experiment(load(f"{small.ROOT}/configs/{name}.py"), TRAINING)
        init = functools.partial(init_params, parts.model, parts.shape)
        return parts.shape, jax.eval_shape(init, jax.random.key(0))

    for family in ("sit", "dit"):
        (low, ours), (high, theirs) = (
            shapes(f"{family}_xl2"),
            shapes(f"{family}_xl2_512"),
        )
        assert ours == theirs and (low, high) == ((32, 32, 4), (64, 64, 4))


def test_a_dit_becomes_a_sit_and_not_the_other_way(thousand, tmp_path, monkeypatch):
    dit = small.checkpoint(tmp_path / "dit", config(5, DiT))
    state, told = begun(config(5), dit, monkeypatch)
    old, new = given(dit, "ema"), flat(state.ema)
    assert all(np.array_equal(old[name], new[name]) for name in old)
    assert "DiT's weights, which mean another output" in told
    with pytest.raises(UserError, match="a SiT, whose variance half no gradient"):
        begun(config(5, DiT), thousand, monkeypatch)


def test_what_does_not_fit_is_listed(thousand, monkeypatch):
    wider = config(10)
    wider.model.width = 32
    with pytest.raises(UserError, match="another architecture: .*is .*, not .*32") as e:
        begun(wider, thousand, monkeypatch)
    assert TABLE not in str(e.value)  # that one would have been begun anew


def test_weights_only_leaves_the_optimizer(tmp_path, monkeypatch):
    c = config(5)
    parts = build_experiment(c, TRAINING)
    state = create_train_state(parts.optimizer, small.random_params(parts, 0)).replace(
        step=7
    )
    state = jax.tree.map(np.asarray, state)
    items, meta = start.pack(state, parts.ema_decay)
    small.save(tmp_path, 7, {"config": to_json(c), **meta}, **items)
    assert int(begun(c, tmp_path, monkeypatch)[0].step) == 7
    again, told = begun(c, tmp_path, monkeypatch, weights_only=True)
    assert int(again.step) == 0 and told.endswith("; optimizer and step new")


def test_a_torch_file_gives_its_weights(monkeypatch):
    """The recorded SiT, as --init would open it; 4 classes in place of its own."""
    path = FOLDER / "weights" / "sit_a.pt"
    base = lambda family: load(small.ROOT / "configs" / f"{family}_xl2.py")
    torch_file = lambda path: open_torch(path, base, "sit", 4)
    theirs = torch_file(path)
    c = theirs.config.copy_and_resolve_references()
    c.model.classes = 4
    state, told = begun(c, path, monkeypatch, torch_file=torch_file)
    old = flat(theirs.load("ema", None, make_mesh(-1, 1)))
    new = flat(state.ema)
    unlike = {name for name in old if not np.array_equal(old[name], new[name])}
    assert unlike == {TABLE} and new[TABLE].shape[0] == 5
    assert "only cond/label/embedding" in told


@pytest.mark.slow
def test_a_folder_of_photographs_is_finetuned_and_sampled(
    thousand, tmp_path, monkeypatch, capsys
):
    """Classes counted from the folder, images through a VAE, sheets of pictures."""
    for label in range(10):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(photographs.png(label, 32, 32))
    latents = dict(shape=(4, 4, 4), synthetic=False, vae=str(FOLDER / "vae"))
    released = small.checkpoint(tmp_path / "released", own := config(1000, **latents))
    own.source = spec(ImageFolder, path=str(tmp_path / "photos"), size=32)
    own.count_classes, own.steps, own.save_every = True, 2, 2
    own.codec = spec(load(small.ROOT / "configs/sit_xl2.py").codec.make)
    work = tmp_path / "run"
    assert train.train(own, work, train.Given(str(released))) == 0
    assert json.loads((work / "config.json").read_text())["model"]["classes"] == 10
    log = (work / "log.txt").read_text()
    assert "is new, for 10 classes instead of 1000, null label 10" in log
    assert checkpoint.find_step(work)[1] == 2
    code, out, err = small.called(
        sample.main,
        *(monkeypatch, capsys, "--weights", work, "--num", 10, "--labels", "balanced"),
        *("--guidance", 2, "--out", tmp_path / "x.npz"),
    )
    assert code == 0, err
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (10, 32, 32, 3)
        assert file["arr_1"].tolist() == list(range(10))
