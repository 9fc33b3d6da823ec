"""Training in two and four real processes: what one gives, and what if one ends.

Some minutes: pytest tests/slow/test_many_processes.py
"""

import signal
import time

import numpy as np
import processes
import pytest
import small
from PIL import Image

from sit_jax import checkpoint

LONG = ("--config.steps=400", "--config.save_every=20", "--config.preview=0")
SHORT = ("--config.steps=6", "--config.save_every=3", "--config.preview=5")


def words(workdir, *fields):
    return (
        "train.py",
        "--config",
        "tests/small_config.py",
        "--workdir",
        workdir,
        *fields,
    )


MORE = ("--config.steps=9", "--config.save_every=3", "--config.preview=0")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of nine steps in one process, which draws after six too."""
    workdir = tmp_path_factory.mktemp("one")
    drawing = ("--config.preview=5", "--config.sample_every=6")
    processes.run(1, *words(workdir, *MORE, *drawing))
    return workdir


@pytest.mark.parametrize("count", [2, 4])
def test_training_on_many_then_on_fewer(tmp_path, alone, count):
    """Six steps on many processes; three more on half, as by one process alone.

    Losses to 1e-5: Adam's steps carry the rounding of the first ones further.
    """
    processes.run(count, *words(tmp_path / "many", *SHORT))
    one, many = small.losses(alone), small.losses(tmp_path / "many")
    assert list(many) == list(range(1, 7))
    first = [one[step] for step in many]
    np.testing.assert_allclose(list(many.values()), first, rtol=1e-5)
    sheets = [path / "samples" / "0000006.png" for path in (alone, tmp_path / "many")]
    assert np.abs(np.subtract(*map(pixels, sheets))).max() <= 1
    said = processes.run(count // 2, *words(tmp_path / "many", *MORE))
    assert "goes on from step 6" in said
    many = small.losses(tmp_path / "many")
    assert list(many) == list(range(1, 10))
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-5)


def pixels(path):
    return np.asarray(Image.open(path), int)


def started(workdir, count, script=("train.py",)):
    """A long run of `count` processes, in the middle."""
    long = words(workdir, *LONG, "--heartbeat-timeout", 20)[1:]
    each = processes.begin(count, *script, *long)
    log = workdir / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 50:
        assert all(process.poll() is None for process in each), processes.end(each)
        time.sleep(0.02)
    return each


@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_the_others_end_and_fewer_go_on(tmp_path, victim):
    each, begun = started(tmp_path, 2), time.monotonic()
    each[victim].kill()
    found = processes.end(each)
    assert time.monotonic() - begun < 20
    code, _, errors = found[1 - victim]
    line = errors.splitlines()[-1]
    assert code == 75, errors
    assert line.startswith(f"process {1 - victim} of 2: train.py: process {victim} (")
    newest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert f"is gone without a word; {newest} is the newest checkpoint in" in line
    assert "the same command goes on from there" in line
    said = processes.run(1, *words(tmp_path, f"--config.steps={newest + 5}", *LONG[1:]))
    assert f"goes on from step {newest}" in said
    losses = small.losses(tmp_path)
    assert sorted(losses) == list(range(1, newest + 6))


WITHOUT = """
from jax._src import distributed
from sit_jax import command, hosts
import train

def without(*words):
    begin(*words)  # which calls it by itself
    del type(distributed.global_state).initialize_preemption_sync_manager

begin, hosts._begin = hosts._begin, without
command.script(train.main)
"""


@pytest.mark.parametrize("script", [("train.py",), ("-c", WITHOUT)], ids=["", "ours"])
def test_sigterm_on_one_saves_the_same_step_on_all(tmp_path, script):
    """By JAX's service, whose names are private, or by our own sockets without them."""
    each = started(tmp_path, 2, script)
    each[1].send_signal(signal.SIGTERM)
    found = processes.end(each)
    assert [code for code, *_ in found] == [0, 0], found
    newest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert f"stopped at step {newest}; the same command" in found[0][1]
    assert newest < 400 and max(small.losses(tmp_path)) == newest


def test_all_of_a_second_run_hear_of_the_first(tmp_path):
    """All of its processes, whatever the first run is replacing meanwhile."""
    first = started(tmp_path, 2)
    second = processes.end(processes.begin(2, *words(tmp_path, *LONG)))
    said = f"{tmp_path} is in use by process {first[0].pid}"
    for code, _, errors in second:
        assert code == 2 and said in errors and errors.count("\n") == 1, errors
    first[1].terminate()
    assert [code for code, *_ in processes.end(first)] == [0, 0]
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_to_one_that_compiles_ends_all(tmp_path, monkeypatch, number):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    each = processes.begin(2, *words(tmp_path / "run", *LONG))
    log = tmp_path / "run" / "log.txt"
    while not log.exists() or "GMAC an image" not in log.read_text():
        assert all(process.poll() is None for process in each), processes.end(each)
        time.sleep(0.02)
    time.sleep(0.3)  # nothing is compiled by then
    begun = time.monotonic()
    each[1].send_signal(number)
    found = processes.end(each)
    took = time.monotonic() - begun
    print(f"{took:.1f} s")
    assert [code for code, *_ in found] == [0, 0], found
    said = "stopped while compiling, after step 0; the same command goes on from there"
    assert said in found[0][2] and said in found[1][2]
    assert took < 5 and not checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_disk_that_only_one_cannot_write_ends_all(tmp_path):
    """Process 0 alone finds the workdir in the way; the other hears it, with code 2."""
    (tmp_path / "file").write_text("in the way")
    found = processes.end(processes.begin(2, *words(tmp_path / "file", *SHORT)))
    assert [code for code, *_ in found] == [2, 2], found
    for _, _, errors in found:
        assert str(tmp_path / "file") in errors and errors.count("\n") == 1, errors


BAD = {
    "batch": ((), ("--config.batch_size=9",), "9 is not divisible by 2"),
    "other arguments": (("--config.seed=1",), (), "process 1 ("),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_of_each(tmp_path, name):
    last, all_of_them, says = BAD[name]
    port = f"localhost:{processes.free_port()}"
    each = []
    for index in range(2):
        place = ("--coordinator", port, "--processes", 2, "--process", index)
        more = last if index else ()
        each += processes.begin(1, *words(tmp_path / "x", *all_of_them, *more, *place))
    for index, (code, _, errors) in enumerate(processes.end(each, 60)):
        assert code == 2 and says in errors and errors.count("\n") == 1, errors
        assert errors.startswith(f"process {index} of 2: train.py: ")
    assert not (tmp_path / "x").exists()


def test_a_missing_process_ends_the_run_in_time(tmp_path):
    more = ("--join-timeout", 3, "--processes", 2, "--process", 0)
    address = ("--coordinator", f"localhost:{processes.free_port()}")
    begun = time.monotonic()
    [(code, _, errors)] = processes.end(
        processes.begin(1, *words(tmp_path / "x", *more, *address))
    )
    assert code == 2 and time.monotonic() - begun < 40
    assert errors.startswith("process 0 of 2: train.py: process 1 of 2 did not come to")
