"""sample.py called in this process, on weights of its own."""

import json

import pytest
from helpers import small

from sit_jax.cli import sample


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("weights"), small.config())


@pytest.fixture
def run(monkeypatch, capsys, weights):
    def run(*arguments, weights=weights):
        given = ("--weights", weights) if weights else ()
        return small.called(sample.main, monkeypatch, capsys, *given, *arguments)

    return run


def manifest(path):
    return json.loads(path.with_name(f"{path.name}.manifest.json").read_text())
