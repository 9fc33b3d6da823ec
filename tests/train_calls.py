"""train.py called in this process on a tiny run."""

import pytest
import small
from conftest import ROOT

from sit_jax.cli import train

TINY = ROOT / "tests" / "small_config.py"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        return small.called(train.main, monkeypatch, capsys, *arguments)

    return run
