"""Coins for mirroring, broken images, processes that read: none of them a surprise."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import photographs
import pytest
from marked import Deadly, Marked, Spying

from sit_jax.data.coins import coins
from sit_jax.data.feed import batches, order
from sit_jax.data.folders import ImageFolder
from sit_jax.data.reading import read, read_with_gaps
from sit_jax.data.workers import Workers
from sit_jax.errors import UserError
from sit_jax.parallel.mesh import make_mesh


def drawn(source, steps=6, batch_size=8, **settings):
    """-> ids, mirrored, labels, each [steps * batch_size]."""
    mesh = make_mesh(data=-1, fsdp=1)
    with batches(source, batch_size, 0, 0, mesh, **settings) as feed:
        each = [jax.device_get(next(feed)) for _ in range(steps)]
    images = np.concatenate([batch["image"] for batch in each])[:, 0, :, 0]
    labels = np.concatenate([batch["label"] for batch in each])
    return images.min(1), images[:, 0] == 255, labels


def test_coins_are_fair_and_independent():
    tossed = np.stack([coins(seed, np.arange(40_000)) for seed in range(4)])
    assert tossed.dtype == bool
    # a share of 40,000 fair coins has standard deviation 0.0025; asserted within 4
    assert abs(tossed.mean(1) - 0.5).max() < 0.01
    same = lambda a, b: abs((a == b).mean() - 0.5)
    assert max(same(tossed[i], tossed[j]) for i in range(4) for j in range(i)) < 0.01
    assert max(same(tossed[0][k:], tossed[0][:-k]) for k in (1, 2, 3, 8, 256)) < 0.01
    far = 10**12 + np.arange(9)
    np.testing.assert_array_equal(coins(7, far[4:]), coins(7, far)[4:])


def test_half_of_the_records_are_mirrored_by_position():
    source, steps = Marked(50), 40
    ids, mirrored, _ = drawn(source, steps)
    np.testing.assert_array_equal(mirrored, coins(0, np.arange(steps * 8)))
    ordered = order(50, 0)
    assert [int(ordered[k]) for k in range(320)] == ids.tolist()
    twice = [mirrored[ids == i] for i in range(50)]  # every image is seen both ways:
    both = sum(len(set(seen.tolist())) == 2 for seen in twice)
    assert both > 35  # in 6.4 epochs all but 1 in 2^5.4, so 49 of 50


def test_sources_that_do_not_flip_are_not_asked():
    _, mirrored, _ = drawn(Marked(50, flip=False), 4)
    assert not mirrored.any()


def test_a_broken_image_is_replaced_named_and_counted():
    said = []
    ids, mirrored, labels = drawn(Marked(20, {3, 4, 19}), 10, say=said.append)
    whole, also_mirrored, _ = drawn(Marked(20), 10)
    wanted = whole.copy()
    for i, instead in ((3, 5), (4, 5), (19, 0)):  # the next one that is whole
        wanted[whole == i] = instead
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(labels, wanted % 3)
    np.testing.assert_array_equal(mirrored, also_mirrored)
    names = sorted(line.split()[2] for line in said)  # in 4 epochs, each named once
    assert names == ["19.jpg:", "3.jpg:", "4.jpg:"] and "takes its place" in said[0]


def test_too_many_broken_images_end_it(capfd):
    drawn(Marked(20, {3, 4}, share=0.1), 5)
    assert capfd.readouterr().err.count("broken image: ") == 2
    with pytest.raises(UserError, match=r"3 of 20 images are broken, .*=0\.1 allows"):
        drawn(Marked(20, {3, 4, 19}, share=0.1), 5)
    with pytest.raises(UserError, match="all 5 images are broken; the last: .*torn"):
        drawn(Marked(5, range(5)))


def test_gaps_keep_their_place():
    rows, broken = read_with_gaps(Marked(9, {5}), [4, 5, 6], [False, True, True])
    assert rows["label"].tolist() == [1, -1, 0] and broken == {5: "5.jpg: torn"}
    assert rows["image"][:, 0, :, 0].tolist() == [[4, 255], [0, 0], [255, 6]]


def test_processes_do_not_change_the_batches():
    source = Marked(30, {7, 8})
    wanted = drawn(source, say=lambda line: None)
    said = []
    for ours, theirs in zip(
        drawn(source, workers=2, say=said.append), wanted, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert len(said) == 2


def test_image_sources_travel_to_processes(tmp_path):
    source = ImageFolder(photographs.folder(tmp_path), 12)
    reader = Workers(source, 1)
    try:
        rows, _ = reader([0, 4, 8], np.array([False, True, False]))
    finally:
        reader.close()
    wanted, _ = read(source, [0, 4, 8], [False, True, False])
    for name in wanted:
        np.testing.assert_array_equal(rows[name], wanted[name])


def test_a_process_that_dies_is_reported():
    reader = Workers(Deadly(9), 1)
    with pytest.raises(UserError, match="has died; is there enough memory"):
        reader([0, 1], np.zeros(2, bool))
    reader.close()


SCRIPT = """
import os, signal
import jax
import numpy as np
from marked import Reporting, Spying
from sit_jax.data.workers import Workers

if __name__ == "__main__":
    for source in (Spying(9), Reporting(9)):
        reader = Workers(source, 1)
        print(reader([0], np.zeros(1, bool))[0]["label"][0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_import_no_jax_run_no_script_and_end_with_their_parent(tmp_path):
    here, _ = read(Spying(9), [0], [False])
    assert here["label"][0] & 1  # here JAX is imported, so the spy sees it
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, tmp_path / "script.py"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        found, child = (int(parent.stdout.readline()) for _ in range(2))
        assert parent.wait() == -signal.SIGKILL
    assert found == 0
    for _ in range(100):
        if not running(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError(f"process {child} outlived its parent")


def running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_is_left_running():
    drawn(Marked(30), 1, workers=1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("settings", [{"threads": 0}, {"workers": -1}], ids=str)
def test_wrong_counts_are_refused(settings):
    with pytest.raises(UserError, match="at least 1 and 0"):
        drawn(Marked(9), **settings)
