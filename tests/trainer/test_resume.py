"""Where a run begins: its own checkpoints, given weights, and how it goes on."""

import copy
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import adapters, pictures, small
from helpers.networks import quick_jit
from helpers.recorded import FOLDER

from sit_jax import checkpoint
from sit_jax.cli import sample
from sit_jax.config import spec, to_json
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.open import WeightsRef
from sit_jax.data.folders import ImageFolder
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.dit import DiT
from sit_jax.parallel.mesh import make_mesh
from sit_jax.recipes import sit
from sit_jax.samplers.ddpm import DDIM
from sit_jax.trainer import resume
from sit_jax.trainer.loop import train
from sit_jax.trainer.resume import (
    checkpoint_items,
    checkpoint_meta,
    init_lora,
    read_history,
    restore_or_init,
)
from sit_jax.training.state import TrainState, init_params


@pytest.fixture(scope="module")
def parts():
    return build_experiment(small.config(), TRAINING)


@pytest.fixture(scope="module")
def weights(parts):
    return small.random_params(parts, 0)


@pytest.fixture(scope="module")
def pristine(parts, weights, tmp_path_factory):
    """-> a checkpoint directory with steps 3, 5 and 8: the weights and that number."""
    directory = tmp_path_factory.mktemp("pristine")
    fresh = TrainState.create(weights, parts.optimizer, ema_decay=parts.ema_decay)
    for step in (3, 5, 8):
        params = jax.tree.map(partial(np.add, np.float32(step)), weights)
        state = fresh.replace(params=params, step=np.int32(step))
        items, meta = checkpoint_items(state), checkpoint_meta(state)
        meta["config"] = to_json(small.config())
        small.save(directory, step, meta, **items)
    return directory


@pytest.fixture
def saved(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "saved")


def damage(step):
    file = max(step.glob("params/**/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def begun(parts, directory):
    """-> state, and the sentence that says where it comes from."""
    mesh = make_mesh(devices=jax.devices()[:1])
    return restore_or_init(parts, mesh, 0, directory)[:2]


def holds(state, weights, step):
    added = jax.tree.map(np.subtract, state.params, weights)
    assert all(np.allclose(leaf, step, atol=1e-5) for leaf in jax.tree.leaves(added))
    return int(state.step) == step


def test_the_newest_step_that_is_whole_is_taken(parts, weights, saved):
    damage(saved / "8")
    (saved / "5/ema/_METADATA").unlink()
    state, said = begun(parts, saved)
    assert holds(state, weights, 3)
    assert said.startswith("goes on from step 3; WARNING: step 8 is damaged (params/")
    assert (
        "WARNING: step 5 is damaged (ema/_METADATA is missing); it is kept as" in said
    )
    assert checkpoint.steps(saved) == [3]
    assert (saved / "8.damaged").is_dir() and (saved / "5.damaged").is_dir()


def test_a_second_damaged_step_takes_the_place_of_the_first(parts, saved):
    (saved / "8.damaged").mkdir()
    damage(saved / "8")
    begun(parts, saved)
    assert sorted(path.name for path in saved.glob("8*")) == ["8.damaged"]


def test_given_weights_are_never_exchanged_for_others(parts, saved):
    damage(saved / "8")
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(checkpoint.DamagedCheckpoint, match="8 is damaged"):
        restore_or_init(parts, mesh, 0, saved / "none", WeightsRef(saved))
    assert checkpoint.steps(saved) == [3, 5, 8]


def test_a_save_that_was_cut_off_is_told(parts, saved):
    (saved / "9.orbax-checkpoint-tmp").mkdir()
    state, said = begun(parts, saved)
    assert int(state.step) == 8 and "save 9.orbax-checkpoint-tmp is removed" in said


def test_a_run_goes_on_from_its_own_steps_and_not_from_what_it_began_with(
    parts, weights, saved
):
    """--init stays on the command line; the weights it names are not taken again."""
    mesh = make_mesh(devices=jax.devices()[:1])
    (saved / "given").mkdir()
    shutil.copytree(saved / "3", saved / "given" / "3")
    shutil.rmtree(saved / "3")
    state, *_ = restore_or_init(parts, mesh, 0, saved, WeightsRef(saved / "given"))
    assert holds(state, weights, 8)


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


def begun_from(c, given, monkeypatch, **more):
    monkeypatch.setattr(jax, "jit", quick_jit)
    init, parts = WeightsRef(given, **more), build_experiment(c, TRAINING)
    return resume.restore_or_init(parts, make_mesh(), 3, "nowhere", init)[:2]


def flat(tree):
    return {k: np.asarray(v) for k, v in flatten_dict(tree, sep="/").items()}


def changes(state, opened, experiment=None):
    """-> the tensors of opened weights that a state, and its EMA, has not taken."""
    found = set()
    for item, tree in (("params", state.params), ("ema", state.ema["ema"])):
        old, new = flat(opened.load(item, experiment, make_mesh(-1, 1))), flat(tree)
        assert old.keys() == new.keys()
        found |= {name for name in old if not np.array_equal(old[name], new[name])}
    return found


def changes_of(state, directory):
    opened = WeightsRef(directory).open()
    return changes(state, opened, build_experiment(opened.config, TRAINING))


def test_of_other_classes_only_the_label_table_is_new(thousand, monkeypatch):
    state, told = begun_from(config(10), thousand, monkeypatch)
    assert changes_of(state, thousand) == {TABLE}
    rows = flat(state.ema["ema"])[TABLE]
    old = small.random_params(build_experiment(config(1000), TRAINING), 10)
    assert rows.shape == (11, 16)
    np.testing.assert_array_equal(rows[10], flat(old)[TABLE][1000])  # the null row
    fresh = init_params(
        build_experiment(config(10), TRAINING).model, (4, 4, 1), jax.random.key(3)
    )
    np.testing.assert_allclose(rows[:10], flat(fresh)[TABLE][:10], rtol=1e-6)
    assert int(state.step) == 0 and not int(state.opt_state[0].count)
    assert f"only {TABLE} (11, 16) is new, for 10 classes instead of 1000" in told
    assert "null label 10" in told


def test_another_resolution_takes_every_parameter(thousand, monkeypatch):
    larger = config(1000, shape=(8, 8, 1))
    state, told = begun_from(larger, thousand, monkeypatch)
    assert not changes_of(state, thousand)
    assert "positions of 8 x 8 instead of 4 x 4" in told and "is new" not in told


def test_a_dit_becomes_a_sit_and_not_the_other_way(thousand, tmp_path, monkeypatch):
    dit = small.checkpoint(tmp_path / "dit", config(5, DiT))
    state, told = begun_from(config(5), dit, monkeypatch)
    assert not changes_of(state, dit)
    assert "DiT's weights, which mean another output" in told
    with pytest.raises(UserError, match="a SiT, whose variance half no gradient"):
        begun_from(config(5, DiT), thousand, monkeypatch)


def test_what_does_not_fit_is_listed(thousand, monkeypatch):
    wider = config(10)
    wider.model.width = 32
    with pytest.raises(UserError, match="another architecture: .*is .*, not .*32") as e:
        begun_from(wider, thousand, monkeypatch)
    assert TABLE not in str(e.value)  # that one would have been begun anew


def test_weights_only_leaves_the_optimizer(tmp_path, monkeypatch):
    c = config(5)
    parts = build_experiment(c, TRAINING)
    state = TrainState.create(small.random_params(parts, 0), parts.optimizer).replace(
        step=7
    )
    state = jax.tree.map(np.asarray, state)
    items = checkpoint_items(state)
    meta = checkpoint_meta(state)
    small.save(tmp_path, 7, {"config": to_json(c), **meta}, **items)
    assert int(begun_from(c, tmp_path, monkeypatch)[0].step) == 7
    again, told = begun_from(c, tmp_path, monkeypatch, weights_only=True)
    assert int(again.step) == 0 and told.endswith("; optimizer and step new")


def test_a_torch_file_gives_its_weights(monkeypatch):
    """The recorded SiT, as --init would open it; 4 classes in place of its own."""
    path = FOLDER / "weights" / "sit_a.pt"
    torch_file = lambda path: open_torch_file(path, family="sit", heads=4)
    theirs = torch_file(path)
    c = theirs.config.copy_and_resolve_references()
    c.model.classes = 4
    state, told = begun_from(c, path, monkeypatch, family="sit", heads=4)
    assert changes(state, theirs) == {TABLE}
    assert flat(state.params)[TABLE].shape[0] == 5
    assert "only cond/label/embedding" in told


def test_adapters_whose_newest_meta_is_damaged_go_on_from_an_older_step(tmp_path):
    base = small.checkpoint(tmp_path / "base", small.config())
    parts, state, record = adapters.begun(base)
    meta = {**checkpoint_meta(state), "base": record}
    small.save(tmp_path / "run", 3, meta, **checkpoint_items(state))
    shutil.copytree(tmp_path / "run/3", tmp_path / "run/5")
    (tmp_path / "run/5/meta/metadata").unlink()
    _, told, _ = init_lora(parts, make_mesh(), 0, tmp_path / "run")
    assert told.startswith("goes on from step 3; WARNING: step 5 is damaged")
    assert f"adapters of {base}/8" in told


@pytest.mark.slow
def test_a_folder_of_photographs_is_finetuned_and_sampled(
    thousand, tmp_path, monkeypatch, capsys
):
    """Classes counted from the folder, images through a VAE, sheets of pictures."""
    for label in range(10):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(pictures.png(label, 32, 32))
    latents = dict(shape=(4, 4, 4), synthetic=False, vae=str(FOLDER / "vae"))
    released = small.checkpoint(tmp_path / "released", own := config(1000, **latents))
    own.source = spec(ImageFolder, path=str(tmp_path / "photos"), size=32)
    own.count_classes, own.steps, own.save_every = True, 2, 2
    own.codec = spec(sit().codec.make)
    work = tmp_path / "run"
    train(own, work, WeightsRef(str(released)))
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


NOW = to_json(small.config())
MESH = make_mesh()


def before(**changes):
    config = copy.deepcopy(NOW)
    config.update(changes)
    return config


def save_step(directory, step, meta):
    small.save(directory, step, meta, params={"w": np.zeros(3)})
    return directory


def test_a_run_that_begins_has_no_past(tmp_path):
    assert read_history(tmp_path / "none", 5, NOW, MESH) == (0, [])


def test_other_settings_are_told_and_the_same_are_not(tmp_path):
    mesh = {"data": 2, "fsdp": 4}
    config = before(keep_last=7, mesh=mesh)
    save_step(tmp_path, 5, {"config": config, "records": 40, "mesh": mesh})
    changes = [
        "keep_last was 7, is 3",
        "saved on 8 devices (data 2 x fsdp 4 x tensor 1), goes on on 8 devices "
        "(data 1 x fsdp 8 x tensor 1)",
    ]
    assert read_history(tmp_path, 5, NOW, MESH) == (0, changes)
    save_step(tmp_path, 6, {"config": NOW, "records": 48, "mesh": dict(MESH.shape)})
    assert read_history(tmp_path, 6, NOW, MESH) == (0, [])


@pytest.mark.parametrize("told", [{"records": 80}, {}])
def test_batches_of_another_size_go_on_behind_the_last_record(tmp_path, told):
    """Without the number, of a checkpoint from before it was kept, it is 5 x 16."""
    save_step(tmp_path, 5, {"config": before(batch_size=16), **told})
    skip, changes = read_history(tmp_path, 5, NOW, MESH)
    assert changes[0] == "batch_size was 16, is 8"
    assert changes[1].startswith("from record 80 on a step takes 8; the learning")
    assert 5 * 8 + skip == 80
    save_step(tmp_path, 7, {"config": NOW, "records": 7 * 8 + skip})
    assert read_history(tmp_path, 7, NOW, MESH)[0] == skip  # and once more
