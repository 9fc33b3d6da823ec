"""Files that every process reads for itself: torch weights, and what may be wrong.

Each process has a home folder of its own here, as hosts have: ~/x.pt are several files.
Two minutes: pytest tests/slow/test_given_processes.py
"""

import shutil
import time

import numpy as np
import pytest
import torch
from helpers import processes, small

STEPS = ("--config.steps=4", "--config.save_every=4", "--config.preview=0")
STEPS += ("--heartbeat", 10)
# other classes too: what is taken over and what is new has to be alike everywhere
INIT = ("--config.model.classes=7", "--init", "~/x.pt", "--family", "sit", "--heads", 2)


def words(workdir):
    config = ("train.py", "--config", "tests/helpers/small_config.py")
    return (*config, "--workdir", workdir, *STEPS, *INIT)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A bare state dict of a small SiT, as the releases are."""
    folder = tmp_path_factory.mktemp("released")
    small.checkpoint(folder / "w", small.config())
    made = small.script("port_weights.py", folder / "w", folder / "x.pt")
    assert made.returncode == 0, made.stderr
    return folder / "x.pt"


def homes(folder, count, file, name="x.pt"):
    """-> a home for each process, with its copy of the file."""
    found = [folder / f"home{index}" for index in range(count)]
    for home in found:
        home.mkdir()
        shutil.copy(file, home / name)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, released):
    """The workdir of a run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    home = homes(folder, 1, released)
    said = processes.run(1, *words(folder / "run"), homes=home)
    assert "starts from the weights of" in said and "7 classes instead of 5" in said
    return folder / "run"


@pytest.mark.parametrize("count", [2, 4])
def test_many_begin_with_the_weights_that_one_begins_with(
    tmp_path, released, alone, count
):
    """Losses to 1e-5, as of other runs of many: sums are taken in another order."""
    each = homes(tmp_path, count, released)
    said = processes.run(count, *words(tmp_path / "many"), homes=each)
    assert "7 classes instead of 5" in said
    one, many = (small.losses(folder) for folder in (alone, tmp_path / "many"))
    assert list(many) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-5)


def missing(path):
    path.unlink()


def another(path):
    """One number of one tensor is another: only the bytes tell."""
    state = torch.load(path, weights_only=True)
    next(iter(state.values())).view(-1)[0] += 1
    torch.save(state, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def other_network(path):
    state = torch.load(path, weights_only=True)
    torch.save({"weight": next(iter(state.values()))}, path)


DIFFERENT = "it is not the same file everywhere: copy one to all"
WRONG = {  # what one sees, and whether both see it
    missing: ("no weights at {home}/x.pt", False),
    another: (DIFFERENT, True),
    cut: ("{home}/x.pt", False),
    other_network: (DIFFERENT, True),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("victim", [0, 1])
def test_wrong_file_of_one_process_ends_both(tmp_path, released, wrong, victim):
    """What only one sees is its own line; JAX ends the other."""
    each = homes(tmp_path, 2, released)
    wrong(each[victim] / "x.pt")
    begun = time.monotonic()
    found = processes.end(processes.begin(2, *words(tmp_path / "run"), homes=each), 120)
    print(
        f"ended after {time.monotonic() - begun:.0f} s: {[code for code, *_ in found]}"
    )
    line, both = WRONG[wrong]
    for index, (code, _, errors) in enumerate(found):
        assert code == 2 if both else code != 0, errors
        if both or index == victim:
            said = errors.splitlines()[1]  # after the line of waiting
            assert said.startswith(f"process {index}: train.py: "), errors
            assert line.format(home=each[victim]) in said, errors
    assert not (tmp_path / "run").exists()
