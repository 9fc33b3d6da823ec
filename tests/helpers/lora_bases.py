"""A network to adapt, and a run of adapters over it."""

import numpy as np
import pytest
from helpers import small
from helpers.lora_runs import saved

from sit_jax.cli import sample


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("base"), small.config())


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    return saved(tmp_path_factory.mktemp("run") / "run", base)


@pytest.fixture
def called(monkeypatch, capsys):
    return lambda script, *words: small.called(script.main, monkeypatch, capsys, *words)


def drawn(called, tmp_path, name, *words):
    out = tmp_path / f"{name}.npy"
    asked = () if "--from-manifest" in words else ("--labels", "0,3")
    code, _, err = called(sample, *asked, "--out", out, *words)
    assert code == 0, err
    return np.load(out)
