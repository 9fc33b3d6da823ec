"""Batches whose records depend on (seed, step, batch size) alone."""

import sys
import threading
import time

import numpy as np
import pytest
from numbered import Numbered, Single, ids_of, mesh

from sit_jax.data import batches
from sit_jax.data.feed import order, rows
from sit_jax.errors import UserError
from sit_jax.parallel.mesh import batch_sharding, make_mesh


def test_every_epoch_is_another_permutation():
    # 3 epochs of 13 records in batches of 8: they begin and end inside batches
    drawn = ids_of(Numbered(13), 8, 5).ravel()[:39].reshape(3, 13)
    for epoch in drawn:
        assert sorted(epoch) == list(range(13))
    assert len({tuple(epoch) for epoch in drawn}) == 3


def test_seeds_differ_and_do_not_share_epochs():
    source, epochs = Numbered(24), {}
    for seed in range(4):
        for epoch in ids_of(source, 8, 9, seed).reshape(3, 24):
            assert epochs.setdefault(tuple(epoch), seed) == seed
    assert len(epochs) == 12


@pytest.mark.parametrize("first", [1, 3, 6])
def test_resuming_continues_the_unbroken_order(first):
    unbroken = ids_of(Numbered(13), 8, 8)
    resumed = ids_of(Numbered(13), 8, 8 - first, first_step=first)
    np.testing.assert_array_equal(resumed, unbroken[first:])


def test_devices_and_threads_do_not_change_the_order():
    wanted = ids_of(Numbered(13), 8, 6)
    for devices, threads in ((1, 1), (2, 7), (4, 3)):
        drawn = ids_of(Numbered(13), 8, 6, devices=devices, threads=threads)
        np.testing.assert_array_equal(drawn, wanted)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_each_batch_without_gap_or_overlap(hosts):
    places = batch_sharding(mesh()).devices_indices_map((16,))
    share = 8 // hosts
    held = []
    for host in range(hosts):
        own = [place for device, place in places.items() if device.id // share == host]
        held.append(rows(own, 16))
    assert all(len(part) == 16 // hosts for part in held)
    assert sum(held, []) == list(range(16))


def test_rows_held_by_several_devices_are_read_once():
    assert rows([(slice(0, 4), slice(None)), (slice(0, 4),), (slice(8, 12),)], 12) == [
        *range(4),
        *range(8, 12),
    ]
    assert rows([(slice(None),)], 3) == [0, 1, 2]


def test_batches_are_global_arrays_over_the_mesh():
    devices = make_mesh(data=2, fsdp=4)
    with batches(Numbered(40), 16, 0, 0, devices) as feed:
        batch = next(feed)
    assert batch["latent"].shape == (16, 1, 1, 1)
    assert batch["latent"].sharding == batch_sharding(devices)
    assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32
    assert {shard.data.shape[0] for shard in batch["label"].addressable_shards} == {2}
    ids = np.asarray(batch["latent"]).ravel().astype(int)
    np.testing.assert_array_equal(batch["label"], ids % 3)


def test_a_source_smaller_than_a_batch_wraps_around():
    drawn = ids_of(Numbered(3), 8, 3).ravel()
    for epoch in drawn.reshape(8, 3):
        assert sorted(epoch) == [0, 1, 2]


def test_order_reaches_far_without_going_there():
    ids = order(1_281_167, 0)
    far = [int(ids[10**9 + k]) for k in range(4)]
    assert len(set(far)) == 4 and max(far) < 1_281_167


def test_batches_of_another_size_go_on_in_the_same_order():
    """Three steps of 8, then steps of 16: no record twice, none left out."""
    source = Numbered(100)
    long = ids_of(source, 8, 7).ravel()
    then = ids_of(source, 16, 2, first_step=3, skip=3 * 8 - 3 * 16).ravel()
    np.testing.assert_array_equal(then, long[24:56])


@pytest.mark.parametrize("batch_size, shards", [(12, 8), (0, 8), (5, 2)])
def test_batches_must_divide_over_devices(batch_size, shards):
    with pytest.raises(UserError, match=rf"batch_size={batch_size} .* {shards} dev"):
        batches(Numbered(4), batch_size, 0, 0, mesh(shards))


def test_wrong_sources_and_settings_are_refused(monkeypatch):
    with pytest.raises(UserError, match="empty"):
        batches(Numbered(0), 8, 0, 0, mesh())
    with pytest.raises(UserError, match="seed=-1"):
        batches(Numbered(4), 8, -1, 0, mesh())
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match="pip install grain"):
        batches(Numbered(4), 8, 0, 0, mesh())


@pytest.mark.parametrize(
    "record, says",
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
def test_bad_records_are_refused_by_number(record, says):
    with batches(Single(**record), 8, 0, 0, mesh()) as feed:
        with pytest.raises(UserError, match=says) as caught:
            next(feed)
        assert "0" in str(caught.value)
        with pytest.raises(StopIteration):  # and no step is left out afterwards
            next(feed)


def test_an_error_comes_at_its_own_step():
    class Torn(Numbered):
        def __getitem__(self, i):
            if i == self.bad:
                raise UserError("cannot read record")
            return super().__getitem__(i)

    source = Torn(24)
    source.bad = int(order(24, 0)[17])  # in step 2
    with batches(source, 8, 0, 0, mesh()) as feed:
        next(feed)
        time.sleep(0.1)  # by now step 2 has failed in its thread
        next(feed)
        with pytest.raises(UserError, match="cannot read record"):
            next(feed)


def test_closing_ends_all_threads():
    before = threading.active_count()
    feed = batches(Numbered(64, delay=0.002), 8, 0, 0, mesh(), threads=5)
    next(feed)
    assert threading.active_count() > before
    feed.close()
    feed.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(feed)


def test_waiting_is_counted_once():
    # a batch of 8 takes 8 x 10 ms in its thread, and the first one is waited for
    with batches(Numbered(64, delay=0.01), 8, 0, 0, mesh(), threads=1) as feed:
        next(feed)
        assert 0.05 < feed.waited() < 2
        assert feed.waited() == 0
        while not feed._ready():  # meanwhile the next one arrives
            time.sleep(0.01)
        next(feed)
        assert feed.waited() < 0.05


def test_reading_says_nothing(capfd):
    ids_of(Numbered(9), 8, 3)
    assert capfd.readouterr() == ("", "")
