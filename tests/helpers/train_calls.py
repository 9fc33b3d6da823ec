"""train.py called in this process on a tiny run."""

import pytest
from conftest import ROOT
from helpers import small

from sit_jax.cli import train

TINY = ROOT / "tests" / "helpers" / "small_config.py"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        return small.called(train.main, monkeypatch, capsys, *arguments)

    return run
