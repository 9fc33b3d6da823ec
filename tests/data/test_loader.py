"""Batches whose records depend on (seed, step, batch size) alone."""

import contextlib
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.pictures import Deadly, Marked, Numbered, Single

from sit_jax.data.loader import (
    abstract_batch,
    batches,
    held_rows,
    random_flip,
    read_record,
    read_records,
    shuffled_indices,
)
from sit_jax.errors import UserError
from sit_jax.parallel.mesh import batch_sharding, make_mesh

RECORDED = json.loads((Path(__file__).parent / "old_version/order.json").read_text())


def mesh(devices=8):
    return make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])


def ids_of(source, batch_size, steps, seed=0, devices=8, **settings):
    """Returns record ids int [steps, batch_size]."""
    with batches(source, batch_size, seed, mesh(devices), **settings) as loader:
        latents = [np.asarray(next(loader)["latent"]) for _ in range(steps)]
    return np.stack(latents).reshape(steps, batch_size).astype(int)


def marked_rows(source, steps=6, seed=0, **settings):
    """Returns ids, flips, labels, each [steps * 8], of a Marked source."""
    with batches(source, 8, seed, mesh(), **settings) as loader:
        steps = [jax.device_get(next(loader)) for _ in range(steps)]
    images = np.concatenate([batch["image"] for batch in steps])[:, 0, :, 0]
    labels = np.concatenate([batch["label"] for batch in steps])
    return images.min(1), images[:, 0] == 255, labels


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"seed{case['seed']}")
def test_order_and_flips_are_those_of_version_0_1(case):
    """Recorded with its own shuffling, for several seeds, lengths, steps and skips."""
    source, steps = Marked(case["length"]), len(case["ids"]) // 8
    first = case["first_step"] * 8 + case["skip"]
    ids, flips, _ = marked_rows(source, steps, case["seed"], first=first)
    assert ids.tolist() == case["ids"]
    assert flips.astype(int).tolist() == case["flips"]


@pytest.mark.parametrize("length", [13, 3])
def test_epochs_are_different_permutations(length):
    epochs = np.reshape(
        [shuffled_indices(length, 0)[i] for i in range(4 * length)], (4, -1)
    )
    assert (np.sort(epochs) == np.arange(length)).all()
    assert len({tuple(epoch) for epoch in epochs}) > 2


def test_seeds_differ_and_do_not_share_epochs():
    epochs = {}
    for seed in range(4):
        ids = [shuffled_indices(24, seed)[i] for i in range(72)]
        for epoch in np.reshape(ids, (3, 24)):
            assert epochs.setdefault(tuple(epoch), seed) == seed
    assert len(epochs) == 12


@pytest.mark.parametrize(
    "devices, threads, first", [(1, 1, 0), (2, 7, 1), (4, 3, 3), (8, 4, 6)]
)
def test_devices_threads_and_resuming_do_not_change_the_order(devices, threads, first):
    ids = ids_of(Numbered(13), 8, 2, 0, devices, threads=threads, first=first * 8)
    wanted = [shuffled_indices(13, 0)[first * 8 + i] for i in range(16)]
    assert ids.ravel().tolist() == wanted


def test_hosts_share_each_batch_without_gap_or_overlap():
    slices = batch_sharding(mesh()).devices_indices_map((16,))
    held = []
    for host in range(4):
        own = [index for device, index in slices.items() if device.id // 2 == host]
        held.append(held_rows(own, 16))
    assert all(len(part) == 4 for part in held) and sum(held, []) == list(range(16))
    shared = [(slice(0, 4), slice(None)), (slice(0, 4),), (slice(8, 12),)]
    assert held_rows(shared, 12) == [*range(4), *range(8, 12)]  # each once
    assert held_rows([(slice(None),)], 3) == [0, 1, 2]


def test_batches_are_global_arrays_over_the_mesh():
    devices = make_mesh(data=2, fsdp=4)
    with batches(Numbered(40), 16, 0, devices) as loader:
        batch = next(loader)
    assert batch["latent"].shape == (16, 1, 1, 1)
    assert batch["latent"].sharding == batch_sharding(devices)
    assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32
    assert {shard.data.shape[0] for shard in batch["label"].addressable_shards} == {2}
    ids = np.asarray(batch["latent"]).ravel().astype(int)
    np.testing.assert_array_equal(batch["label"], ids % 3)


def test_shuffled_indices_reach_far_without_going_there():
    far = [int(shuffled_indices(1_281_167, 0)[10**9 + k]) for k in range(4)]
    assert len(set(far)) == 4 and max(far) < 1_281_167


def test_empty_source_is_refused():
    with pytest.raises(UserError, match="the data source is empty"):
        batches(Numbered(0), 8, 0, mesh())


@pytest.mark.parametrize(
    "record, message",
    [
        ({"label": 3}, r"label 3, but there are 3 classes \(0..2\)"),
        ({"label": -1}, "label -1"),
        ({"label": None}, r"\['latent'\]; it needs label"),
        ({"latent": None}, r"\['label'\]; it needs label and one of image, moments"),
        ({"image": np.zeros((1, 1, 1), np.uint8)}, r"\['image', 'label', 'latent'\]"),
        ({"latent": np.zeros((1, 2, 1), np.float32)}, r"\[1, 2, 1\] instead of"),
        ({"latent": np.zeros((1, 1, 1))}, r"float64 .* instead of float32"),
    ],
)
def test_bad_records_are_refused_by_name(record, message):
    with pytest.raises(UserError, match=f"record 0 .*{message}"):
        read_record(Single(**record), 0)


def test_errors_come_at_their_own_step_and_end_it():
    class Torn(Numbered):
        bad = int(shuffled_indices(24, 0)[17])  # in step 2

        def __getitem__(self, i):
            if i == self.bad:
                raise UserError("cannot read record")
            return super().__getitem__(i)

    with batches(Torn(24), 8, 0, mesh()) as loader:
        next(loader)
        time.sleep(0.1)  # by now step 2 has failed in its thread
        next(loader)
        with pytest.raises(UserError, match="cannot read record"):
            next(loader)
        with pytest.raises(StopIteration):  # and no step is left out
            next(loader)


def reading_threads():
    return sum("prefetch" in thread.name for thread in threading.enumerate())


def test_closing_ends_all_threads():
    loader = batches(Numbered(64, delay=0.002), 8, 0, mesh(), threads=5)
    next(loader)
    assert reading_threads() >= 5
    loader.close()
    loader.close()
    for _ in range(100):  # each ends after the batch that it is in
        if not reading_threads():
            break
        time.sleep(0.02)
    assert not reading_threads()
    with pytest.raises(StopIteration):
        next(loader)


def test_waiting_is_counted_once():
    # a batch of 8 takes 8 x 10 ms in its thread, and the first one is waited for
    with batches(Numbered(64, delay=0.01), 8, 0, mesh(), threads=1) as loader:
        next(loader)
        assert 0.05 < loader.waited() < 2
        assert loader.waited() == 0
        time.sleep(0.5)  # meanwhile the next one arrives
        next(loader)
        assert loader.waited() < 0.05


def test_random_flip_is_a_fair_and_independent_coin():
    flips = np.stack([random_flip(seed, np.arange(40_000)) for seed in range(4)])
    assert flips.dtype == bool
    # a share of 40,000 fair coins has standard deviation 0.0025; asserted within 4
    assert abs(flips.mean(1) - 0.5).max() < 0.01
    same = lambda a, b: abs((a == b).mean() - 0.5)
    assert max(same(flips[i], flips[j]) for i in range(4) for j in range(i)) < 0.01
    assert max(same(flips[0][k:], flips[0][:-k]) for k in (1, 2, 3, 8, 256)) < 0.01
    far = 10**12 + np.arange(9)
    np.testing.assert_array_equal(random_flip(7, far[4:]), random_flip(7, far)[4:])


def test_flips_are_those_of_positions_and_only_where_a_source_flips():
    _, flips, _ = marked_rows(Marked(50), 10)
    np.testing.assert_array_equal(flips, random_flip(0, np.arange(80)))
    _, flips, _ = marked_rows(Marked(50, flip=False), 4)
    assert not flips.any()


def test_corrupt_images_are_replaced_named_and_counted():
    lines = []
    source = Marked(20, {3, 4, 19})
    ids, flips, labels = marked_rows(source, 10, say=lines.append)
    intact_ids, intact_flips, _ = marked_rows(Marked(20), 10)
    wanted = intact_ids.copy()
    for i, instead in ((3, 5), (4, 5), (19, 0)):  # the next one that is whole
        wanted[intact_ids == i] = instead
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(labels, wanted % 3)
    np.testing.assert_array_equal(flips, intact_flips)
    names = sorted(line.split()[2] for line in lines)  # in 4 epochs, each named once
    assert names == ["19.jpg:", "3.jpg:", "4.jpg:"] and "takes its place" in lines[0]


def test_corrupt_images_end_it_if_too_many(capfd):
    marked_rows(Marked(20, {3, 4}, fraction=0.1), 5)
    assert capfd.readouterr().err.count("corrupt image: ") == 2
    with pytest.raises(UserError, match=r"3 of 20 images are corrupt, .*=0\.1 allows"):
        marked_rows(Marked(20, {3, 4, 19}, fraction=0.1), 5)
    with pytest.raises(UserError, match="all 5 images are corrupt; the last: .*torn"):
        marked_rows(Marked(5, range(5)))


def test_abstract_batch_is_that_of_batches_even_if_the_first_image_is_corrupt():
    shapes = abstract_batch(Marked(9, {0}), 8, mesh())
    with batches(Marked(9, {0}), 8, 0, mesh(), say=[].append) as loader:
        for name, array in next(loader).items():
            like = shapes[name]
            assert (array.shape, array.dtype) == (like.shape, like.dtype)
            assert array.sharding == like.sharding


def test_corrupt_images_can_keep_their_row():
    flips = [False, True, True]
    rows, corrupt = read_records(Marked(9, {5}), [4, 5, 6], flips, replace=False)
    assert rows["label"].tolist() == [1, -1, 0] and corrupt == {5: "5.jpg: torn"}
    assert rows["image"][:, 0, :, 0].tolist() == [[4, 255], [0, 0], [255, 6]]


def test_worker_processes_do_not_change_the_batches():
    source, lines = Marked(30, {7, 8}), []
    wanted = marked_rows(source, say=lambda line: None)
    rows = marked_rows(source, workers=2, say=lines.append)
    np.testing.assert_array_equal(rows, wanted)
    assert len(lines) == 2 and not multiprocessing.active_children()


def test_workers_that_die_are_reported():
    with pytest.raises(UserError, match="has died; fewer workers need less memory"):
        marked_rows(Deadly(9), workers=1)


SCRIPT = """
import os, signal
import grain, numpy as np
from helpers.pictures import Reporting
from sit_jax.data.loader import prefetch, read_records

def read(ids):
    return read_records(Reporting(9), ids, np.zeros(1, bool))[0]["label"][0]

if __name__ == "__main__":
    steps = grain.MapDataset.source([[0]] * 9).map(read)
    print(next(prefetch(steps, 1, workers=1)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, tmp_path / "script.py"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        status = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert parent.wait() == -signal.SIGKILL
    until = time.monotonic() + 10
    with contextlib.suppress(OSError):  # the file goes with the process
        while status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < until, "it outlived its parent"
            time.sleep(0.05)


def test_code_that_reads_imports_no_jax(tmp_path):
    code = (
        "import sys; from sit_jax.data import Synthetic; Synthetic((2, 2, 1), 3)[0]; "
        "import sit_jax.data.archives, sit_jax.data.folders, sit_jax.data.latent_cache"
        "; sys.exit(any(m in sys.modules for m in ('jax', 'tensorflow', 'grain')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
