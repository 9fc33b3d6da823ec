"""Which process of how many this is: by flags, torchrun's variables and Slurm's."""

import pytest
from meetings import flags, place

from sit_jax import hosts
from sit_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[003-004],other",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
TORCH = {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}


def test_alone_unless_something_says_otherwise():
    assert place() is None
    assert place("--processes", "1") is None
    assert place(environ={**TORCH, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert place(environ={"WORLD_SIZE": "1"}) is place("--processes", "1") is None
    assert (hosts.index(), hosts.count(), hosts.first()) == (0, 1, True)
    assert hosts.exchange(3) == [3] and hosts.told(3) == 3
    hosts.join(flags())
    assert not hosts.several()


def test_places_by_flags_torch_and_slurm(monkeypatch):
    words = ("--coordinator", "[::1]:99", "--processes", "2", "--process", "1")
    found = place(*words)
    assert (found.host, found.port, found.count, found.index) == ("::1", 99, 2, 1)
    found = place(environ=TORCH)
    assert (found.address, found.count, found.index) == ("a:29500", 4, 3)
    assert found.devices is None  # all of the host's
    by_torchrun = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1"}
    found = place(environ={**TORCH, **by_torchrun, "LOCAL_WORLD_SIZE": "2"})
    assert (found.port, found.devices) == (29501, [1])  # torchrun has the port itself
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = place()
    assert (found.host, found.count, found.index) == ("node003", 3, 1)


@pytest.mark.parametrize(
    "words, environ, says",
    [
        (["--process", "1"], {}, "--coordinator, --processes and --process go tog"),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process", "2"],
            {},
            "process 2 of 2 (flags): they count from 0 to 1",
        ),
        (
            ["--coordinator", "a:1", "--processes", "0", "--process", "0"],
            {},
            "0 processes",
        ),
        (
            ["--coordinator", "a", "--processes", "2", "--process", "0"],
            {},
            "'a' (flags); it must be HOST:PORT",
        ),
        ([], {**TORCH, "RANK": "4"}, "process 4 of 4 (MASTER_ADDR"),
        ([], {**TORCH, "RANK": "one"}, "RANK is 'one'"),
        ([], {**TORCH, "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two'"),
        ([], {**TORCH, "MASTER_PORT": ""}, "WORLD_SIZE is 4 without MASTER_PORT; set"),
    ],
    ids="lonely range none address rank word local half".split(),
)
def test_wrong_places_are_named(words, environ, says):
    with pytest.raises(UserError) as refused:
        place(*words, environ=environ)
    assert says in str(refused.value)


@pytest.mark.parametrize("value", ["0", "inf", "nan", "200000"])
def test_a_time_limit_of_nothing_or_for_ever_is_refused(value):
    for flag in ("--join-timeout", "--heartbeat-timeout"):
        with pytest.raises(UserError, match=f"{flag} {value}: from 1 to 86,400 sec"):
            hosts.join(flags(flag, value))
