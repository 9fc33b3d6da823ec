"""Which process of how many this is, and two real processes."""

import argparse

import jax
import pytest
from helpers import processes

from sit_jax.data.loader import shuffled_indices
from sit_jax.errors import UserError
from sit_jax.parallel import multihost

TORCH = {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}
BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
CLUSTERS = (*TORCH, *BY_TORCHRUN, *multihost.SIZES)
FLAGS = ("--coordinator", "[::1]:99", "--processes", "2", "--process", "1")


class Joined(BaseException):
    """What jax.distributed.initialize was called with."""


@pytest.fixture
def join(monkeypatch):
    """-> join(*flags, **environ): arguments of jax.distributed.initialize, or None."""

    def initialize(**arguments):
        raise Joined(arguments)

    def join(*words, **environ):
        for name in CLUSTERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        parser = argparse.ArgumentParser()
        multihost.add_flags(parser)
        try:
            multihost.initialize(parser.parse_args(words))
        except Joined as joined:
            return joined.args[0]

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return join


def test_initialize_joins_by_flags_and_says_before_for_whom_it_waits(join, capsys):
    arguments = join(*FLAGS, "--heartbeat", "10")
    assert arguments["coordinator_address"] == "[::1]:99"
    assert (arguments["num_processes"], arguments["process_id"]) == (2, 1)
    assert arguments["heartbeat_timeout_seconds"] == 10
    line = "waiting for 2 processes at [::1]:99, at most 300 s\n"
    assert capsys.readouterr().err == line


def test_initialize_joins_by_torchruns_variables(join):
    arguments = join(**TORCH)
    assert arguments["coordinator_address"] == "a:29500"
    assert (arguments["num_processes"], arguments["process_id"]) == (4, 3)
    assert "local_device_ids" not in arguments  # all devices of this machine
    arguments = join(**TORCH, **BY_TORCHRUN)
    assert arguments["coordinator_address"] == "a:29501"  # torchrun listens at 29500
    assert arguments["local_device_ids"] == 1


@pytest.mark.parametrize("name", multihost.SIZES)
def test_initialize_leaves_clusters_to_jax(join, capsys, name):
    arguments = join(**{name: "3"})
    assert not {"coordinator_address", "num_processes"} & arguments.keys()
    assert "waiting for 3 processes at the address" in capsys.readouterr().err


def test_initialize_leaves_one_machine_alone(join):
    assert join("--processes", "1", **TORCH) is None
    assert join(**TORCH | {"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert join(SLURM_STEP_NUM_TASKS="1") is None


def test_functions_answer_for_one_process(monkeypatch):
    def touch():
        raise AssertionError("a device was used")

    monkeypatch.setattr(jax, "process_index", touch)
    monkeypatch.setattr(jax, "process_count", touch)
    assert (multihost.process_index(), multihost.process_count()) == (0, 1)
    assert multihost.is_primary() and multihost.all_gather(3) == [3]
    assert multihost.broadcast("x") == "x"
    assert multihost.reached_stop(5, True) and not multihost.reached_stop(5, False)
    multihost.barrier()


@pytest.mark.parametrize(
    "words, environ, line",
    [
        (["--process", "1"], {}, "--coordinator, --processes and --process go tog"),
        (FLAGS[2:], TORCH, "--coordinator, --processes and --process go tog"),
        ([*FLAGS[:-1], "2"], {}, "process 2 of 2: they count from 0 to 1"),
        (["--coordinator", "a", *FLAGS[2:]], {}, "'a'; it must be HOST:PORT"),
        ([], {**TORCH, "RANK": "4"}, "process 4 of 4"),
    ],
    ids=["one", "two", "range", "address", "rank"],
)
def test_initialize_names_wrong_places(join, words, environ, line):
    with pytest.raises(UserError, match=line):
        join(*words, **environ)


PROGRAM = """
import argparse
import numpy as np
from helpers.pictures import Numbered
from sit_jax.data.loader import batches
from sit_jax.errors import UserError
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import make_mesh

parser = argparse.ArgumentParser()
multihost.add_flags(parser)
multihost.initialize(parser.parse_args())
index = multihost.process_index()
assert multihost.all_gather("x" * 9 * index) == ["", "x" * 9]
array = np.arange(3) if multihost.is_primary() else None
assert multihost.broadcast_array(array).tolist() == [0, 1, 2]
try:
    multihost.assert_equal("index", index, "be alike")
except UserError as error:
    assert str(error) == "index: 0 in process 0, 1 in process 1; be alike"
with batches(Numbered(13), 8, 0, make_mesh(data=-1, fsdp=1), first=8) as loader:
    (shard,) = next(loader)["latent"].addressable_shards
print("rows", multihost.all_gather(shard.data.ravel().tolist()))
"""


def test_two_processes_exchange_values_and_share_batches():
    """Training as one: tests/slow/test_many_processes.py."""
    out = processes.run(2, "-c", PROGRAM)
    assert "2 processes, each with 1 x cpu" in out
    ids = [int(shuffled_indices(13, 0)[8 + i]) for i in range(8)]
    assert f"rows {[list(map(float, ids[:4])), list(map(float, ids[4:]))]}" in out
