"""The way from A's pictures to B's, one component at a time."""

import json

import numpy as np
import pytest
from flax import struct
from helpers import small

from sit_jax.cli import diagnose
from sit_jax.config import to_json
from sit_jax.diagnosis.swaps import DecodedLatents, swap_components
from sit_jax.models.codec import to_uint8, to_uint8_mdt
from sit_jax.sampling.job import SamplingJob


class Scaled(struct.PyTreeNode):
    """A codec of one number."""

    gain: float
    rounding: object = struct.field(pytree_node=False, default=to_uint8)

    def decode(self, x):
        return self.rounding(self.gain * x)


def pictures(images):
    return np.concatenate(list(images.batches(2)))


def test_swap_components_exchanges_one_at_a_time(tmp_path):
    rng = np.random.default_rng(0)
    x, y, z = rng.uniform(-1, 1, (3, 5, 2, 2, 1)).astype(np.float32)
    a, b = (
        DecodedLatents("a", Scaled(0.5), x),
        DecodedLatents("b", Scaled(0.7, to_uint8_mdt), y),
    )
    by = lambda latents, gain, rule: np.asarray(rule(gain * latents)).repeat(3, -1)
    want = {
        "A": by(x, 0.5, to_uint8),
        "noise and labels": by(z, 0.5, to_uint8),
        "latents": by(y, 0.5, to_uint8),
        "decode": by(y, 0.7, to_uint8),
        "rounding": by(y, 0.7, to_uint8_mdt),
    }
    np.save(tmp_path / "z.npy", z)
    found = swap_components(a, b, tmp_path / "z.npy")
    assert [name for name, _ in found] == list(want) and found[-1][1] is b
    for name, images in found:
        np.testing.assert_array_equal(pictures(images), want[name])
    names = [name for name, _ in swap_components(a, b)]
    assert names == ["A", "noise, labels and latents", "decode", "rounding"]
    same = dict(swap_components(a, b, same_start=True))
    assert same["noise and labels"] is a  # nothing to exchange


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *words: small.called(diagnose.main, monkeypatch, capsys, *words)


def side(path, latents, **fields):
    c = small.config(shape=(8, 8, 1))
    labels = np.arange(len(latents), dtype=np.int32) % 5
    np.save(path, latents)
    record = {"job": SamplingJob("w", to_json(c), labels, **fields).to_json()}
    path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(record))
    return path


def test_steps_of_a_report_add_up_to_the_gap(tmp_path, run):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (200, 8, 8, 1)).astype(np.float32)
    a = side(tmp_path / "a.npy", x)
    b = side(tmp_path / "b.npy", x + np.float32(0.1), rounding="mdt")
    images = rng.integers(0, 256, (150, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "ref", arr_0=images)
    np.savez(tmp_path / "ref_b", arr_0=images // 2)
    features = np.abs(rng.standard_normal((200, 64))).astype(np.float32)
    np.savez(tmp_path / "f", features=features)
    flags = ("--network", "digits", "--reference", tmp_path / "ref.npz")
    flags += ("--reference-b", tmp_path / "ref_b.npz", "--resamples", 10)
    flags += ("--features-b", tmp_path / "f.npz")
    code, _, err = run(a, b, *flags, "--out", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    names = [row["after"] for row in found["swaps"]]
    assert names == [
        *("A", "noise and labels", "latents", "decode", "rounding", "features"),
        "reference",
    ]
    steps = {row["after"]: row["step"] for row in found["swaps"]}
    assert steps["noise and labels"] == steps["decode"] == 0
    assert min(abs(steps[n]) for n in ("latents", "rounding", "features")) > 0
    total = found["swaps"][-1]["fid"] - found["swaps"][0]["fid"]
    assert sum(steps.values()) == pytest.approx(total, abs=1e-6)
    assert found["swaps"][0]["fid"] == found["paired"]["fids"][0]
    assert len(found["worst"]) == 8
    assert (tmp_path / "out" / "worst_pairs.png").exists()
    few, out = tmp_path / "few.npy", tmp_path / "no"
    np.save(few, x[:7])
    npz = (tmp_path / "f.npz", tmp_path / "f.npz", "--reference", tmp_path / "f.npz")
    npy = (a, b, "--network", "digits", "--reference", tmp_path / "ref.npz")
    refusals = {
        (*npz, "--swapped", a): "goes with latents (.npy)",
        (*npy, "--swapped", tmp_path / "none.npy"): "--swapped: no file at",
        (*npy, "--swapped", few): "few.npy has 7 latents, B 200: it is what A's",
        (*npy, "--inception-b", "x"): "no use beside --network digits",
        (a, b, "--swapped", a): "--swapped is for figures of pictures",
    }
    for words, message in refusals.items():
        code, _, err = run(*words, "--out", out)
        assert code == 2 and message in err and not out.exists()
