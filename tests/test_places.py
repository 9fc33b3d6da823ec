"""Addresses are refused where files are meant, and no folder "gs:" is made."""

from pathlib import Path

import pytest
from conftest import ROOT

from sit_jax import checkpoint, drafts, hosts, places
from sit_jax.checkpoint import Checkpoints
from sit_jax.convert.releases import fetch
from sit_jax.data.cache import LatentCache
from sit_jax.data.folders import ImageFolder
from sit_jax.data.sources import LatentFolder
from sit_jax.errors import UserError
from sit_jax.places import appears, local
from sit_jax.sampling import outputs
from sit_jax.trainer.workdir import check_workdir

ASKS = {
    "latents": LatentFolder,
    "cache": LatentCache,
    "images": ImageFolder,
}


@pytest.mark.parametrize("ask", ASKS)
def test_a_bucket_is_refused_with_what_to_do(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        ASKS[ask]("gs://bucket/run")
    said = str(error.value)
    assert said.startswith("gs://bucket/run") and "gcsfuse BUCKET DIR" in said
    assert "\n" not in said and not list(tmp_path.iterdir())


OTHERS = {
    "path": local,
    "workdir": lambda path: check_workdir(path, {}),
    "steps": checkpoint.find_step,
    "saving": Checkpoints,
    "weights": fetch,
    "output": lambda path: outputs.check(f"{path}.png", False),
    "draft": lambda path: drafts.require_free(path, False),
}


@pytest.mark.parametrize("ask", OTHERS)
def test_other_storage_is_refused_everywhere(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://b/x.*: only paths of files.* s3 storage"):
        OTHERS[ask]("s3://b/x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a:b", "a/b://c", "hf:owner/repo/file", "C://x", "x"])
def test_odd_names_are_paths(name):
    assert local(name) == Path(name)


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert local("~/x") == Path("/somewhere/x") and local(ROOT) == ROOT


def test_what_another_host_has_written_may_take_a_moment(tmp_path, monkeypatch):
    """As NFS has it: a name that was free stays so until its folder is listed."""
    listed = []
    monkeypatch.setattr(places.os, "listdir", listed.append)
    monkeypatch.setattr(Path, "exists", lambda path: bool(listed))
    hosts.require_shared(tmp_path / "run")
    assert listed == [tmp_path]


def test_and_what_is_not_there_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "LAG", 0.3)
    assert not appears(tmp_path / "none" / "run")
