"""What a kill leaves of an output that was being written or replaced."""

import os
import subprocess
import sys

import pytest

from sit_jax.drafts import draft, drafts, require_free
from sit_jax.errors import UserError

KILLED = """
import os, sys
from pathlib import Path
from sit_jax import drafts

def rename(*words, rename=os.rename):  # the second one puts the new folder there
    calls.append(words)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    rename(*words)

calls, os.rename = [], rename
with drafts.draft(Path(sys.argv[1])) as name:
    name.mkdir()
    (name / "new").touch()
"""


def killed(path, at):
    done = subprocess.run([sys.executable, "-c", KILLED, path, str(at)])
    assert done.returncode == -9


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "old").touch()
    return tmp_path / "ck"


@pytest.mark.parametrize("at", [1, 2])
def test_a_folder_has_its_name_again(folder, capsys, at):
    killed(folder, at)
    assert len(list(folder.parent.glob(".ck.*"))) == at
    with pytest.raises(UserError, match="ck exists; --overwrite replaces it"):
        require_free(folder, False)
    assert (folder / "old").exists() and os.listdir(folder.parent) == ["ck"]
    said = f"{folder} is back: a killed run had moved it aside\n"
    assert capsys.readouterr().err == (said if at == 2 else "")


def test_what_was_replaced_does_not_stay(folder):
    """Killed when the new folder was there, and the old one not yet removed."""
    killed(folder, 2)
    [old], [new] = folder.parent.glob(".*.old"), folder.parent.glob(".ck.*[0-9]")
    new.rename(folder)
    require_free(folder, True)
    assert (folder / "new").exists() and os.listdir(folder.parent) == ["ck"]
    assert not old.exists()


def test_drafts_of_the_living_and_other_names_stay(tmp_path):
    path, dead = tmp_path / "x.npz", 2**22 + 1  # above Linux's largest number
    stay = [".y.4194305.npz", ".x.old", f".x.{os.getppid()}.npz", ".x.4194305.txt"]
    for name in [*stay, f".x.{dead}.npz", f".x.{dead}"]:
        (tmp_path / name).touch()
    with draft(path) as name:
        name.touch()
        require_free(path, False)
        assert sorted(os.listdir(tmp_path)) == sorted([*stay, name.name])
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, "x.npz"])


def test_several_files_and_an_error_leave_nothing(tmp_path):
    paths = [tmp_path / "x.pt", tmp_path / "x.pt.md"]
    with pytest.raises(ValueError), drafts(paths) as folder:
        (folder / "x.pt").touch()
        raise ValueError
    assert not os.listdir(tmp_path)
