"""Where a run begins, if the newest of its checkpoints cannot be trusted."""

import shutil
from functools import partial

import jax
import numpy as np
import pytest
import small

from sit_jax import checkpoint
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.parallel.mesh import make_mesh
from sit_jax.trainer.start import begin, pack
from sit_jax.training.state import create_train_state


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
    fresh = create_train_state(parts.optimizer, weights, parts.ema_decay)
    for step in (3, 5, 8):
        params = jax.tree.map(partial(np.add, np.float32(step)), weights)
        state = fresh.replace(params=params, step=np.int32(step))
        items, meta = pack(state, parts.ema_decay)
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
    return begin(parts, make_mesh(devices=jax.devices()[:1]), 0, directory)


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


def test_without_sums_what_orbax_notices_counts(parts, weights, saved):
    """As far as it does: a file that is gone is noticed, a flipped bit is not."""
    for step in (3, 5, 8):
        (saved / str(step) / "SHA256SUMS").unlink()
    assert "it has no checksums, so" in begun(parts, saved)[1]
    (saved / "8/meta/metadata").unlink()
    state, said = begun(parts, saved)
    assert holds(state, weights, 5) and "WARNING: step 8 is damaged" in said


def test_a_second_damaged_step_of_that_number_gets_another_name(parts, saved):
    (saved / "8.damaged").mkdir()
    damage(saved / "8")
    begun(parts, saved)
    assert sorted(path.name for path in saved.glob("8*")) == ["8.damaged", "8.damaged2"]


def test_with_no_step_left_it_refuses_and_renames_nothing(parts, saved):
    for step in (3, 5, 8):
        damage(saved / str(step))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="8 is damaged"):
        begun(parts, saved)
    assert checkpoint.steps(saved) == [3, 5, 8]


def test_given_weights_are_never_exchanged_for_others(parts, saved):
    damage(saved / "8")
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(checkpoint.DamagedCheckpoint, match="8 is damaged"):
        begin(parts, mesh, 0, saved / "none", given=saved)
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
    state, _ = begin(parts, mesh, 0, saved, given=saved / "given")
    assert holds(state, weights, 8)
