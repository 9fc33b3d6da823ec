"""Every script that computes, in two and four real processes: what one gives.

Some minutes: pytest tests/slow/test_many_processes.py
"""

import json
import signal
import time
from pathlib import Path

import numpy as np
import photographs
import processes
import pytest
import small
from PIL import Image

from sit_jax import checkpoint
from sit_jax.config import spec
from sit_jax.data.sources import Digits

LONG = ("--config.steps=400", "--config.save_every=20", "--config.preview=0")
SHORT = ("--config.steps=6", "--config.save_every=3", "--config.preview=5")
EXTRACT = """
import extract_features
from sit_jax import command
from toy_codec import toy
extract_features.load = lambda vae, precision: toy()
command.script(extract_features.main)
"""
EVALUATE = """
import evaluate
from sit_jax import command
import test_evaluate as t
evaluate.inception_weights.load = lambda path: t.weights()
evaluate.inception_extractor = t.extractor
t.evaluation.LEAST = 205
command.script(evaluate.main)
"""


def words(workdir, *fields):
    return (
        "train.py",
        "--config",
        "tests/small_config.py",
        "--workdir",
        workdir,
        *fields,
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The workdir of a short run in one process."""
    workdir = tmp_path_factory.mktemp("one")
    processes.run(1, *words(workdir, *SHORT))
    return workdir


MORE = ("--config.steps=9", *SHORT[1:])


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The losses of nine steps in one process."""
    workdir = tmp_path_factory.mktemp("nine")
    processes.run(1, *words(workdir, *MORE))
    return small.losses(workdir)


@pytest.mark.parametrize("count", [2, 4])
def test_training_on_many_then_on_fewer(tmp_path, short, longer, count):
    """Six steps on many processes; three more on half, as by one process alone.

    Losses to 1e-5: Adam's steps carry the rounding of the first ones further.
    """
    processes.run(count, *words(tmp_path / "many", *SHORT))
    one, many = small.losses(short), small.losses(tmp_path / "many")
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-5)
    sheets = [path / "samples" / "0000006.png" for path in (short, tmp_path / "many")]
    assert np.abs(np.subtract(*map(pixels, sheets))).max() <= 1
    said = processes.run(count // 2, *words(tmp_path / "many", *MORE))
    assert "goes on from step 6" in said
    many = small.losses(tmp_path / "many")
    assert list(many) == list(range(1, 10))
    np.testing.assert_allclose(list(many.values()), list(longer.values()), rtol=1e-5)


def pixels(path):
    return np.asarray(Image.open(path), int)


def started(workdir, count):
    """A long run of `count` processes, in the middle."""
    each = processes.begin(count, *words(workdir, *LONG, "--heartbeat-timeout", 20))
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


def test_sigterm_on_one_saves_the_same_step_on_all(tmp_path):
    each = started(tmp_path, 2)
    each[1].send_signal(signal.SIGTERM)
    found = processes.end(each)
    assert [code for code, *_ in found] == [0, 0], found
    newest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert f"stopped at step {newest}; the same command" in found[0][1]
    assert newest < 400 and max(small.losses(tmp_path)) == newest


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


def drawn(count, short, out):
    """Ten images by so many processes; -> where they are."""
    draw = ("sample.py", "--weights", short, "--num", 10, "--batch-size", 4)
    said = processes.run(count, *draw, "--labels", "random", "--out", out)
    assert "10 images" in said
    assert not list(Path(out).parent.glob("*.parts"))
    return Path(out)


@pytest.fixture(scope="module")
def ten(tmp_path_factory, short):
    """Ten images, by one process."""
    return drawn(1, short, tmp_path_factory.mktemp("ten") / "x.npz")


def test_ten_images_exactly_once(tmp_path, short, ten):
    """Bytes of one process: an image follows from the seed and its number."""
    many = drawn(4, short, tmp_path / "x.npz")
    with np.load(ten) as ours, np.load(many) as theirs:
        assert ours["arr_0"].shape[0] == 10
        assert ours["arr_0"].tobytes() == theirs["arr_0"].tobytes()
        assert ours["arr_1"].tobytes() == theirs["arr_1"].tobytes()
    records = [
        json.loads(path.with_name(f"{path.name}.manifest.json").read_text())
        for path in (ten, many)
    ]
    for name in ("job", "weights_sha256", "batch_size", "stats", "precision", "codec"):
        assert records[0][name] == records[1][name], name
    assert [record["hosts"] for record in records] == [1, 4]


def test_ten_files_exactly_once(tmp_path, short, ten):
    many = drawn(2, short, f"{tmp_path}/x/")
    names = sorted(path.name for path in many.glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(10)]
    with np.load(ten) as whole:
        for name, image in zip(names, whole["arr_0"], strict=True):
            np.testing.assert_array_equal(pixels(many / name), image, err_msg=name)


def test_likelihoods_of_two_are_those_of_one(tmp_path):
    """Each process measures some of the batches; the table is the same, to a byte."""
    config = small.config(shape=(8, 8, 1), synthetic=False)
    config.source = spec(Digits)
    config.model.classes = 10
    small.checkpoint(tmp_path / "w", config)
    tables = []
    for number in (1, 2):
        out = tmp_path / f"{number}.csv"
        measure = ("sample.py", "--weights", tmp_path / "w", "--likelihood")
        said = processes.run(
            number, *measure, "--num", 7, "--batch-size", 2, "--out", out
        )
        assert "7 records" in said
        tables.append(out.read_bytes())
    assert tables[0] == tables[1] and tables[0].count(b"\n") == 8


def extracted(count, root, out):
    """60 photographs as a cache, by so many processes; -> {name: bytes}."""
    more = ("--vae", "x", "--size", 8, "--out", out, "--shards", 6, "--batch-size", 8)
    said = processes.run(count, "-c", EXTRACT, "--data", root, *more)
    assert f"\n60 images in {out}, 0 broken" in said
    kept = (file for file in out.iterdir() if file.name != "manifest.json")
    return {file.name: file.read_bytes() for file in kept}


def test_extraction_by_many_is_that_by_one(tmp_path):
    root = photographs.folder(tmp_path / "images", each=20, size=(10, 8))
    one, two, four = (extracted(n, root, tmp_path / str(n)) for n in (1, 2, 4))
    assert one == two == four and len(one) == 8


def figures(count, folder):
    """-> those of 211 images, by so many processes."""
    out, kept = folder / f"{count}.json", folder / f"f{count}.npz"
    sides = (folder / "s.npz", "--reference", folder / "r.npz")
    more = ("--out", out, "--save-features", kept, "--batch-size", 16)
    processes.run(count, "-c", EVALUATE, *sides, *more)
    with np.load(kept) as features:
        assert len(features["pool"]) == 211
    found = json.loads(out.read_text())
    assert found["samples"]["images"] == 211
    return found["figures"]


def test_figures_of_many_are_those_of_one(tmp_path):
    """Every image once: 211 of them are no multiple of anything here.

    To 1e-5: features differ by the last bit with the rows on a device.
    """
    rng = np.random.default_rng(0)
    for name, bright in (("s", 256), ("r", 200)):
        image = rng.integers(0, bright, (211, 2, 2, 3)).astype(np.uint8)
        np.savez(tmp_path / name, arr_0=image)
    one, *others = (figures(count, tmp_path) for count in (1, 2, 4))
    for many in others:
        assert many.keys() == one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)
