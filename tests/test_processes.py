"""train.py in two real processes: as one, from the first loss to the checkpoint."""

import jax
import numpy as np
import processes
import small

import train
from sit_jax import checkpoint
from sit_jax.experiment import TRAINING, build_experiment

SIZE = {"steps": 3, "save_every": 3, "preview": 0}


def test_two_processes_train_as_one(tmp_path):
    """The losses differ by the order of sums over the batch, float32 rounding: 1e-6.

    Weights after three steps of Adam differ by more where a gradient is near zero.
    """
    fields = [f"--config.{name}={value}" for name, value in SIZE.items()]
    words = ("--config", "tests/small_config.py", "--workdir", tmp_path / "two")
    said = processes.run(2, "train.py", *words, *fields)
    assert "2 processes, each with 1 x cpu" in said
    assert "batch 8 on 2 x cpu" in said and "saved step 3" in said
    config = small.config(**SIZE)
    assert train.train(config, tmp_path / "one") == 0  # on conftest's eight devices
    one, two = (small.losses(tmp_path / name) for name in ("one", "two"))
    assert list(two) == [1, 2, 3]
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-6)
    folders = [tmp_path / name / "checkpoints" for name in ("one", "two")]
    assert checkpoint.steps(folders[1]) == [3]
    parts = build_experiment(config, TRAINING)
    like = jax.eval_shape(lambda: small.random_params(parts, 0))
    pairs = (
        dict(checkpoint.iter_leaves(folder, 3, "params", like)) for folder in folders
    )
    ours, theirs = pairs
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=1e-5, err_msg=name)
