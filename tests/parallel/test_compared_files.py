"""Files that every process reads for itself are compared before anything begins."""

import types

import numpy as np
import pytest

from sit_jax.convert import peft
from sit_jax.errors import UserError
from sit_jax.parallel import multihost
from sit_jax.sampling import noise


@pytest.fixture
def compared(monkeypatch):
    """Names of the files that several processes would compare."""
    names = []
    note = lambda *paths: names.extend(path.name for path in paths)
    monkeypatch.setattr(multihost, "assert_equal_files", note)
    return names


def test_lora_files_compares_weights_and_config(tmp_path, compared):
    names = ["adapter_model.safetensors", "adapter_config.json"]
    for name in names:
        (tmp_path / name).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    with pytest.raises(UserError):
        peft.read_adapter_files(tmp_path)
    assert compared == names


def test_initial_noise_compares_a_given_file(tmp_path, compared):
    np.save(tmp_path / "z.npy", np.zeros((3, 2, 2, 1), np.float32))
    job = types.SimpleNamespace(noise=str(tmp_path / "z.npy"), labels=(1, 2, 3))
    experiment = types.SimpleNamespace(shape=(2, 2, 1))
    context = types.SimpleNamespace(job=job, experiment=experiment)
    start, _ = noise.load_noise(context)
    assert start.shape == (3, 2, 2, 1) and compared == ["z.npy"]
