"""Every flag of every script, wrongly used: one line, exit code 2, nothing touched.

FLAGS says for each flag what is wrong for it, and the parsers say which flags there
are: a new one without a line here fails. All of it ends before anything is computed.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import small
from conftest import ROOT
from PIL import Image
from toy_codec import toy

from sit_jax import command, extraction, locks, vae_files
from sit_jax.errors import one_line

SCRIPTS = {  # script: what it is called with, where a case says nothing else
    "train": "--config {config} --workdir {new}",
    "sample": "--weights {weights} --out {new}.npz",
    "port_weights": "{weights} {new}.pt",
    "extract_features": "--data {images} --vae x --size 8 --out {new}",
    "evaluate": "--features {features} --reference {features} --out {new} --force",
    "diagnose": "{features} {features} --reference {features} --out {new}",
    "quantize": "{weights} {new}",
    "score_digits": "{samples} --out {new}",
}
COUNT = ("x", "1.5", "0", "-1", "", "1e99")
WHOLE = ("x", "-1", "", "1e3")
SEED = ("x", "-1", str(2**32), "")
REAL = ("x", "nan", "inf", "")
SECONDS = ("x", "0", "-3", "")
POSITIVE = (*REAL, "0", "-1")
SHARE = (*REAL, "-0.1", "1.1")
WORD = ("nonsense", "")
SWITCH = ("=yes",)  # --flag=yes
READ = (
    "{missing}",
    "{garbage}",
    "{folder}",
    "~/no such file {pid}",
    "ö\u2028{missing}",
    "",
)
WRITE = ("{garbage}", "{garbage}/below", "")  # exists; a file where a folder should be
HOSTS = {  # of several processes
    "--coordinator": ("nonsense", ""),
    "--processes": COUNT,
    "--process": WHOLE,
    "--join-timeout": SECONDS,
    "--heartbeat-timeout": SECONDS,
}
PLAN = {  # of a run that is only planned
    "--plan": SWITCH,
    "--topology": ("x", "v5p:4x4x4", ""),
    "--once": SWITCH,
    "--devices": (*COUNT, "8"),
    "--chip": (*WORD, "v5p"),
    "--mfu": (*POSITIVE, "1.5", "0.5"),
}
FLAGS = {  # script: {flag: wrong values}, or (wrong values, what else is on the line)
    "train": {
        "--config": (READ, "--workdir {new}"),
        "--workdir": (("{garbage}/below", "{weights}", ""), "--config {config}"),
        "--wandb": ("",),
        "--init": READ,
        "--weights-only": SWITCH,
        "--family": WORD,
        "--heads": COUNT,
        **HOSTS,
        **PLAN,
    },
    "sample": {
        "--weights": (READ, "--out {new}.npz"),
        "--preset": (WORD, "--out {new}.npz"),
        "--from-manifest": (READ, "--out {new}.npz"),
        "--config": READ,
        "--labels": ("x", "99", "1,,2", "{missing}.npy", "{garbage}", ""),
        "--num": COUNT,
        "--seed": SEED,
        "--out": (
            ("{garbage}", "{garbage}/x.npz", "{new}.jpg", "{new}", "{png}", ""),
            "--weights {weights}",
        ),
        "--noise": ("{missing}.npy", "{garbage}", "torch:x", "{features}", ""),
        "--save-noise": ("{png}", "{new}.png", "{garbage}/x.npy", ""),
        "--lora": READ,
        "--quantize": WORD,
        "--quantize-skip": (("(",), "+ --quantize w8"),
        "--autoguidance": READ,
        "--no-ema": SWITCH,
        "--vae": READ,
        "--rounding": WORD,
        "--family": ("nonsense", "sit", ""),
        "--heads": (*COUNT, "4"),
        "--overwrite": SWITCH,
        "--force": SWITCH,
        "--sampler": WORD,
        "--steps": COUNT,
        "--num-sampling-steps": (*COUNT, "1"),
        "--respacing": ("x", "0", "ddim", "250", ""),
        "--eta": (*REAL, "-1", "0.5"),
        "--atol": (*POSITIVE, "0.1"),
        "--rtol": (*POSITIVE, "0.1"),
        "--step-control": (WORD, "+ --sampler dopri5"),
        "--reverse": SWITCH,
        "--diffusion-form": (WORD, "+ --sampler euler-maruyama"),
        "--diffusion-norm": (*REAL, "-1", "1"),
        "--last-step": (WORD, "+ --sampler euler-maruyama"),
        "--last-step-size": (*SHARE, "0.1"),
        "--trajectory": (*COUNT, "3"),
        "--guidance": REAL,
        "--guidance-interval": ("x", "0.5", "0.8,0.2", "-1,2", ""),
        "--guidance-channels": ("1", "0", "x", "4", ""),
        "--precision": WORD,
        "--likelihood": SWITCH,
        "--probes": COUNT,
        "--trace": WORD,
        "--dequantization": WORD,
        "--batch-size": COUNT,
        "--emulate": WORD,
        **HOSTS,
        **PLAN,
    },
    "port_weights": {
        "source": (("{missing}", "{folder}", "{garbage}"), "{new}.pt"),
        "target": (("{new}", "{garbage}/x.pt", "{weights}"), "{weights}"),
        "--family": ("nonsense", "sit", ""),
        "--heads": (*COUNT, "4"),
        "--config": READ,
        "--step": (*WHOLE, "7"),
        "--to": WORD,
        "--adapter": WORD,
        "--base": READ,
        "--unmerge": READ,
        "--figures": ("{missing}", "{garbage}", "{folder}", ""),
        "--reference": ("{missing}", "{folder}", "{garbage}", ""),
        "--overwrite": SWITCH,
    },
    "extract_features": {
        "--data": (
            ("{missing}", "{garbage}", "{folder}", ""),
            "--vae x --size 8 --out {new}",
        ),
        "--kind": WORD,
        "--vae": READ,
        "--precision": WORD,
        "--size": (*COUNT, "7"),
        "--out": (
            ("{garbage}", "{garbage}/below", "{images}", ""),
            "--data {images} --vae x --size 8",
        ),
        "--batch-size": COUNT,
        "--dtype": WORD,
        "--no-flip": SWITCH,
        "--shards": COUNT,
        "--threads": COUNT,
        "--workers": WHOLE,
        "--broken-share": SHARE,
        "--classes": COUNT,
        "--split": ("",),
        "--tfds-dir": ("",),
        "--seed": SEED,
        **HOSTS,
    },
    "evaluate": {
        "samples": (("{missing}", "{garbage}", "{folder}"), "--reference {features}"),
        "--features": (READ, "--reference {features}"),
        "--reference": (READ, "--features {features}"),
        "--stats": (READ, "--out {new}.npz"),
        "--out": (WRITE, "--features {features} --reference {features} --force"),
        "--save-features": (
            WRITE,
            "{samples} --reference {features} --out {new} --force",
        ),
        "--metrics": WORD,
        "--kid": SWITCH,
        "--bootstrap": (*COUNT, "9"),
        "--network": WORD,
        "--batch-size": COUNT,
        "--inception": (READ, "{samples} --reference {samples} --out {new} --force"),
        "--force": SWITCH,
        "--overwrite": SWITCH,
        **HOSTS,
    },
    "diagnose": {
        "sides": (("{missing}", "{garbage}", "{folder}"), "{samples} --out {new}"),
        "--out": (WRITE, "{samples} {samples}"),
        "--reference": READ,
        "--reference-b": (READ, "+ --reference {features}"),
        "--seeds": (READ, "+ --reference {features}"),
        "--swap": (
            ("x", "a={missing}", "a={garbage}", ""),
            "+ --reference {features}",
        ),
        "--swapped": (READ, "{samples} {samples} --out {new} --reference {features}"),
        "--features-b": (READ, "+ --reference {features}"),
        "--paired": SWITCH,
        "--resamples": (*COUNT, "9"),
        "--inception": (READ, "{samples} {samples} --out {new} --reference {features}"),
        "--inception-b": (READ, "+ --reference {features}"),
        "--network": WORD,
        "--batch-size": COUNT,
        "--overwrite": SWITCH,
        "--collect": (WRITE, "--from-manifest {missing}"),
        "--from-manifest": (READ, "--collect {new}"),
        "--weights": (READ, "--collect {new} --from-manifest {manifest}"),
        "--inputs": (READ, "--collect {new} --from-manifest {manifest}"),
        "--images": COUNT,
        "--steps": COUNT,
        "--features": (READ, "--collect {new} --from-manifest {manifest}"),
        "--force": SWITCH,
        **HOSTS,
    },
    "quantize": {
        "source": (("{missing}", "{folder}", "{garbage}"), "{new}"),
        "target": (("{garbage}", "{garbage}/x"), "{weights}"),
        "--form": WORD,
        "--skip": ("(", ""),
        "--no-ema": SWITCH,
        "--family": ("nonsense", "sit", ""),
        "--heads": (*COUNT, "4"),
        "--overwrite": SWITCH,
    },
    "score_digits": {
        "samples": (("{missing}", "{garbage}", "{features}"), "--out {new}"),
        "--out": (WRITE, "{samples}"),
        "--held-out": (WRITE, "+"),
        "--overwrite": SWITCH,
    },
}  # fmt: skip
CHOSEN = ("x",)  # a function, a class or a switch
FIELDS = {  # of train.py's config
    "accumulate": ("0", "3", "x"),
    "batch_size": ("0", "-8", "7", "x", "1.5"),
    "check_replicas": ("-1", "x"),
    "clip": ("0", "-1", "nan"),
    "codec.make": CHOSEN,
    "codec.rounding": CHOSEN,
    "count_classes": CHOSEN,
    "ema_decay": ("-1", "1.5", "nan"),
    "evaluate_every": ("-1", "x"),
    "evaluate_images": (("x", "0", "-1"), "+ --config.evaluate_every=1"),
    "features": (CHOSEN, "+ --config.evaluate_every=1"),
    "guidance": ("nan", "x"),
    "guidance_channels": ("0", "-1", "x"),
    "keep_every": ("0", "-1", "x"),
    "keep_last": ("0", "-1", "x"),
    "label_drop": ("-0.1", "1.5", "nan", "x"),
    "log_every": ("0", "x"),
    "max_skipped": ("0", "-1", "x"),
    "mesh.data": ("3", "0", "x"),
    "mesh.fsdp": ("7", "x"),
    "mesh.tensor": ("3", "0", "x"),
    "model": ("4",),
    "model.attention": WORD,
    "model.classes": ("0", "-1", "x"),
    "model.depth": ("0", "-1", "x"),
    "model.dpeth": ("4",),
    "model.dtype": ("float7", "3"),
    "model.frequency_shift": ("nan", "x"),
    "model.heads": ("0", "3", "x"),
    "model.learn_sigma": CHOSEN,
    "model.make": CHOSEN,
    "model.mlp_ratio": ("0", "-1", "nan", "x"),
    "model.norm2_epsilon": ("-1", "nan", "x"),
    "model.null_label": CHOSEN,
    "model.patch": ("0", "3", "x"),
    "model.remat": WORD,
    "model.unroll": ("0", "-1", "x"),
    "model.width": ("0", "7", "x"),
    "nonsense": ("1",),
    "optimizer.b1": ("-0.1", "1", "nan"),
    "optimizer.b2": ("1.5",),
    "optimizer.eps": ("-1", "nan", "x"),
    "optimizer.eps_root": ("-1", "nan", "x"),
    "optimizer.learning_rate": ("-1", "nan", "inf", "1e9", "x"),
    "optimizer.make": CHOSEN,
    "optimizer.mask": CHOSEN,
    "optimizer.mu_dtype": ("float7", "3"),
    "optimizer.nesterov": CHOSEN,
    "optimizer.weight_decay": ("-1", "nan", "x"),
    "precision.model": WORD,
    "precision.training": ("nonsense",),
    "precision.vae": WORD,
    "preview": ("-1", "x"),
    "process.make": CHOSEN,
    "process.path": CHOSEN,
    "process.predicts": CHOSEN,
    "process.sample_margin": ("-1", "1", "nan", "x"),
    "process.train_margin": ("-1", "1", "nan", "x"),
    "process.weight": CHOSEN,
    "reference": (("{missing}", "{folder}"), "+ --config.evaluate_every=1"),
    "sample_every": ("-1", "x"),
    "sampler.frames": ("-1", "x"),
    "sampler.make": CHOSEN,
    "sampler.method": CHOSEN,
    "sampler.reverse": CHOSEN,
    "sampler.steps": ("0", "-1", "x"),
    "save_every": ("0", "x"),
    "seed": ("-1", str(2**32), "x"),
    "shape": ("(4,4)", "(0,4,1)", "x"),
    "source.classes": ("x",),
    "source.make": CHOSEN,
    "source.path": (("{missing}", "{garbage}"), "+ --config.synthetic=False"),
    "steps": ("0", "x"),
    "synthetic": ("x",),
    "vae": ("{missing}",),
    "workers": ("-1", "x"),
}


PLACES = ("folder", "garbage", "images", "weights", "secret", "closed")


class Begun(BaseException):
    """What a case may not reach."""


def cases():
    fields = {f"--config.{field}": wrong for field, wrong in FIELDS.items()}
    for script, flags in {**FLAGS, "train": FLAGS["train"] | fields}.items():
        for flag, wrong in flags.items():
            values, line = wrong if isinstance(wrong[0], tuple) else (wrong, None)
            base = SCRIPTS[script]
            line = base if line is None else line.replace("+", base)
            for value in values:
                yield script, flag, value, line


CASES = list(cases())


@pytest.fixture(scope="module")
def place():
    """Files to name; everybody may read them."""
    root = Path(tempfile.mkdtemp(prefix="a place ö "))
    root.chmod(0o755)
    (root / "folder").mkdir()
    (root / "garbage").write_bytes(b"\x93NUM\0PY" * 50)
    (root / "x.png").write_bytes(b"kept")
    (root / "secret").write_bytes(b"x")
    (root / "secret").chmod(0)
    (root / "closed").mkdir(mode=0o555)
    Path(root / "images" / "class").mkdir(parents=True)
    for i in range(2):
        image = np.full((9, 9, 3), i, np.uint8)
        Image.fromarray(image).save(root / "images" / "class" / f"{i}.png")
    rng = np.random.default_rng(0)
    np.savez(root / "features.npz", features=rng.normal(size=(20, 4)))
    digits = rng.integers(0, 255, (4, 8, 8, 1), np.uint8)
    np.savez(root / "samples.npz", arr_0=digits, arr_1=np.arange(4))
    config = small.config()
    small.checkpoint(root / "weights", config)
    (root / "manifest.json").write_text(json.dumps({"job": _job(root, config)}))
    yield root
    shutil.rmtree(root)


def _job(root, config):
    from sit_jax.config import to_json
    from sit_jax.job import Job

    job = Job(str(root / "weights"), to_json(config), np.arange(3, dtype=np.int32))
    return job.to_json()


@pytest.fixture(scope="module")
def names(place):
    return {
        "config": Path(__file__).with_name("small_config.py"),
        "new": place / "new",
        "missing": place / "missing",
        "png": place / "x.png",
        "features": place / "features.npz",
        "samples": place / "samples.npz",
        "manifest": place / "manifest.json",
        "pid": os.getpid(),
        **{name: place / name for name in PLACES},
    }


@pytest.fixture
def sealed(monkeypatch):
    """Nothing may begin to compute."""

    def begin(*words, **fields):
        raise Begun

    modules = {name: importlib.import_module(name) for name in SCRIPTS}
    for script, name in (
        ("train", "_loop"),
        ("port_weights", "draft"),
        ("port_weights", "drafts"),
        ("quantize", "draft"),
        ("evaluate", "write_json"),
        ("score_digits", "score"),
    ):
        monkeypatch.setattr(modules[script], name, begin)
    monkeypatch.setattr(modules["sample"].sampling, "draw", begin)
    monkeypatch.setattr(extraction, "Encoder", begin)
    load = vae_files.load_vae
    toys = lambda source, *words: toy() if source == "x" else load(source, *words)
    monkeypatch.setattr(vae_files, "load_vae", toys)
    monkeypatch.setattr(modules["diagnose"], "collect", begin)
    monkeypatch.setattr(modules["diagnose"].diagnosis, "save", begin)
    return modules


def contents(root):
    """Hashes of all that is below, by path; locks of a moment left out."""
    return {
        path: path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
    }


def words(line, flag, value, names):
    """The command line of a case, as the shell would split it."""
    given = value.format(**names)
    line = [word.format(**names) for word in line.split()]
    if value.startswith("="):
        return [*line, flag + value]
    if flag.startswith("--config."):
        return [*line, f"{flag}={given}"]
    if not flag.startswith("--"):
        return [given, *line] if flag != "target" else [*line, given]
    return [*line, flag, given] if given.startswith("-") is False else [
        *line,
        f"{flag}={given}",
    ]  # fmt: skip


def ids(case):
    script, flag, value, _ = case
    return f"{script} {flag} {value!r}".encode("ascii", "replace").decode()


@pytest.mark.parametrize("case", CASES, ids=map(ids, CASES))
def test_a_mistake_is_one_line_and_touches_nothing(
    case, place, names, sealed, monkeypatch, capsys
):
    script, flag, value, line = case
    before = contents(place)
    argv = words(line, flag, value, names)
    try:
        code, _, err = small.called(sealed[script].main, monkeypatch, capsys, *argv)
        assert contents(place) == before
    finally:
        _clear(place)  # or what begins would fail the cases after it
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("script.py: "), err
    said = value.format(**names)
    assert "Traceback" not in err
    known = [flag.lstrip("-").split(".")[-1].replace("_", "-"), flag.split(".")[-1]]
    if said:
        said = said.strip("=")
        known += [one_line(each) for each in (said, os.path.expanduser(said))]
        known += [one_line(said.partition("=")[2] or said)]
    assert any(word in err for word in known), err


def forbidden():
    """Cases in which a file may not be read, or a folder not be written to."""
    for case in CASES:
        *_, flag, value, _ = case
        if value in ("{garbage}", "a={garbage}") and flag not in WRITTEN:
            yield *case, value.replace("garbage", "secret")
        elif value.startswith("{garbage}/"):
            yield *case, value.replace("garbage", "closed")


WRITTEN = ("--out", "--collect", "--save-features", "--held-out", "target")
FORBIDDEN = list(forbidden())


@pytest.mark.parametrize("case", FORBIDDEN, ids=lambda c: ids((*c[:2], c[4], c[3])))
def test_what_may_not_be_used_is_named(case, place, names, sealed, monkeypatch, capsys):
    script, flag, garbage, line, forbidden = case
    begin = lambda value: small.called(
        sealed[script].main, monkeypatch, capsys, *words(line, flag, value, names)
    )
    place.chmod(0o777)
    before = contents(place)
    try:
        begin(garbage)  # imports what nobody may not import
        with small.unprivileged():
            code, _, err = begin(forbidden)
        assert contents(place) == before
    finally:
        place.chmod(0o755)
        _clear(place)
    assert code == 2 and err.count("\n") == 1, err
    said = str(place / ("closed" if "closed" in forbidden else "secret"))
    assert said in err or flag in err, err


def test_no_script_is_left_out():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLAGS)


def test_there_are_enough_cases():
    assert len(CASES) >= 400


class Found(BaseException):
    pass


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_its_cases(script, sealed, monkeypatch):
    def parse(parser, argv=None):
        raise Found(parser)

    monkeypatch.setattr(command, "parse", parse)
    with pytest.raises(Found) as found:
        sealed[script].main()
    actions = found.value.args[0]._actions
    flags = {(a.option_strings or [a.dest])[0] for a in actions} - {"-h"}
    assert flags == set(FLAGS[script])


def test_every_field_has_its_cases():
    def leaves(node, before=""):
        for name in node:
            inside = hasattr(node[name], "keys")
            yield from leaves(node[name], f"{name}.") if inside else [before + name]

    strange = {"model", "model.dpeth", "nonsense"}
    assert set(leaves(small.config())) == set(FIELDS) - strange


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_line_without_the_mistake_begins(script, sealed, place, names, monkeypatch):
    """Or the cases would fail of something else; its paths have a space and an ö."""

    def begin(*words, **fields):
        raise Begun

    monkeypatch.setattr(sealed["train"], "begin", begin)  # which compiles
    argv = [word.format(**names) for word in SCRIPTS[script].split()]
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(Begun):
        sealed[script].main()
    _clear(place)


def _clear(place):
    for left in place.glob("new*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


LOCKS = {  # script: folder and name of its lock, and a file that is in the way
    "train": ("{new}", "lock", "{new}/config.json"),
    "sample": ("{place}", "new.npz.lock", "{new}.npz"),
    "port_weights": ("{place}", "new.pt.lock", "{new}.pt"),
    "extract_features": ("{new}", "lock", "{new}/cache.json"),
    "evaluate": ("{place}", "new.lock", "{new}"),
    "diagnose": ("{place}", "new.lock", "{new}"),
    "quantize": ("{place}", "new.lock", "{new}"),
}


@pytest.mark.parametrize("script", LOCKS)
def test_two_at_once_in_one_place(script, sealed, names, place, monkeypatch, capsys):
    """The second says so whatever the first has written by then."""
    fill = lambda word: word.format(place=place, **names)
    folder, name, path = map(fill, LOCKS[script])
    argv = [fill(word) for word in SCRIPTS[script].split()]
    with locks.alone(folder, name):
        Path(path).write_text("half of it")
        code, _, err = small.called(sealed[script].main, monkeypatch, capsys, *argv)
        assert code == 2 and f"in use by process {os.getpid()} on" in err, err
        assert Path(path).read_text() == "half of it"
        Path(path).unlink()
    assert not names["new"].exists()
