"""Packages outside the bounds of requirements.txt are told before they fail."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from sit_jax import versions

TEXT = "# a comment\njax>=0.10.2,<0.12  # and one more\ntorch==2.13.0\n"


def told(**installed):
    return list(versions.warnings(TEXT, installed.get))


@pytest.mark.parametrize("jax", ["0.10.2", "0.10.11", "0.11", "0.11.9.dev3"])
@pytest.mark.parametrize("torch", ["2.13.0", "2.13", "2.13.0+cpu", None])
def test_versions_within_the_bounds_say_nothing(jax, torch):
    assert told(jax=jax, torch=torch) == []


@pytest.mark.parametrize("jax", ["0.9.1", "0.10.1", "0.12", "0.12.0rc1", "1.0"])
def test_a_version_outside_is_one_line(jax):
    assert told(jax=jax, torch="2.13.0") == [
        f"WARNING: jax {jax} is installed, which was never tried; requirements.txt "
        "wants jax>=0.10.2,<0.12"
    ]


def test_each_stranger_is_told():
    assert [line.split()[1] for line in told(jax="0.9", torch="2.14")] == [
        "jax",
        "torch",
    ]


def test_every_line_of_the_requirements_is_understood_and_kept_here():
    lines = versions.REQUIREMENTS.read_text().splitlines()
    wanted = [re.match(r"[\w.-]+", line)[0] for line in lines if line[:1] not in "#"]
    asked = []
    none = lambda name: asked.append(name)
    assert list(versions.warnings("\n".join(lines), none)) == []
    assert asked == wanted and len(asked) > 10
    assert versions.of_this_environment() == []


def test_a_script_tells_before_it_imports_what_may_fail(tmp_path):
    (tmp_path / "jax-0.9.1.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: jax\nVersion: 0.9.1\n"
    (tmp_path / "jax-0.9.1.dist-info" / "METADATA").write_text(about)
    (tmp_path / "jax.py").write_text("raise ImportError('of another version')")
    where = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--help"],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
    )
    first = done.stderr.splitlines()[0]
    assert first.startswith("WARNING: jax 0.9.1 is installed, which was never tried")
    assert "of another version" in done.stderr
