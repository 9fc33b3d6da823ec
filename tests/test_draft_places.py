"""A draft of a file or a directory, and the room it needs."""

import resource

import numpy as np
import pytest

from sit_jax.convert import tensor_files
from sit_jax.drafts import draft, require_free, require_space
from sit_jax.errors import UserError


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, ending):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write, File too large"):
            with draft(tmp_path / f"x.{ending}") as name:
                tensor_files.write(name, {"a": np.ones(9_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_draft_takes_its_place_only_when_whole(tmp_path):
    path = tmp_path / "x.pt"
    path.write_text("old")
    with pytest.raises(RuntimeError), draft(path) as name:
        name.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert path.read_text() == "old"
    with draft(path) as name:
        assert name.suffix == ".pt"
        name.write_text("new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


def test_a_draft_directory_replaces_a_full_one(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    with draft(tmp_path / "x") as name:
        name.mkdir()
        (name / "new").touch()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["x", "x/new"]


def test_what_exists_and_what_does_not_fit_is_refused(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="x exists; --overwrite"):
        require_free(tmp_path / "x", overwrite=False)
    require_free(tmp_path / "x", overwrite=True)
    require_free(tmp_path / "y", overwrite=False)
    require_space(tmp_path / "new" / "y", 10)
    with pytest.raises(UserError, match=r"needs 1e\+09 GB"):
        require_space(tmp_path / "new" / "y", 1e18)
