"""Every flag of every script, wrongly used: one line, exit code 2, nothing touched.

mistakes.py says for each flag what is wrong for it, and the parsers say which flags
there are: a new one without a line there fails, and so does a field of any config
without one in field_mistakes.py. All ends before anything is computed.
"""

import itertools
import os
import sys
from pathlib import Path

import misused
import pytest
import small
from conftest import ROOT
from field_mistakes import FIELDS, LINES, OTHERS
from mistakes import FLAGS, SCRIPTS
from misused import Begun, clear, contents, words

from sit_jax import command, config, locks
from sit_jax.errors import one_line
from sit_jax.trainer import adapting

names = misused.names
place = misused.place
sealed = misused.sealed


def cases():
    """(script, flag, a wrong value, the rest of the line)"""
    for script, flags in FLAGS.items():
        yield from of(script, flags, SCRIPTS[script])
    yield from of("train", flagged(FIELDS), SCRIPTS["train"])
    for name, fields in OTHERS.items():
        yield from of("train", flagged(fields), line_of(name))


def of(script, flags, base):
    for flag, wrong in flags.items():
        values, line = wrong if isinstance(wrong[0], tuple) else (wrong, "+")
        for value in values:
            yield script, flag, value, line.replace("+", base)


def flagged(fields):
    return {f"--config.{field}": wrong for field, wrong in fields.items()}


def line_of(name):
    path = ROOT / "configs" / f"{name}.py"
    return f"--config {path} --workdir {{new}} {LINES[name]}"


CASES = list(cases())


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
        clear(place)  # or what begins would fail the cases after it
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
        clear(place)
    assert code == 2 and err.count("\n") == 1, err
    said = str(place / ("closed" if "closed" in forbidden else "secret"))
    assert said in err or flag in err, err


def test_no_script_is_left_out():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLAGS)


def test_there_are_enough_cases():
    assert len(CASES) >= 1000


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


def leaves(node, before=""):
    for name in node:
        path, inside = before + name, hasattr(node[name], "keys")
        yield from leaves(node[name], f"{path}.") if inside else [path]


STRANGE = {"model", "model.dpeth", "nonsense"}


def test_every_field_has_its_cases():
    assert set(leaves(small.config())) == set(FIELDS) - STRANGE


def test_every_field_of_every_config_has_its_cases():
    paths = set((ROOT / "configs").glob("[!_]*.py"))
    found = {path.stem: set(leaves(config.load(path))) for path in paths}
    for name, fields in OTHERS.items():
        assert set(fields) <= found[name], "of another config"
    known = {*FIELDS, *itertools.chain(*OTHERS.values())} - STRANGE
    assert set().union(*found.values()) | set(leaves(small.config())) == known


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
    clear(place)


@pytest.mark.parametrize("name", OTHERS)
def test_the_line_of_a_config_begins(name, sealed, place, names, monkeypatch):
    """Up to where a network is made, or a VAE is read."""

    def begin(*words, **fields):
        raise Begun

    for module, what in (
        (sealed["train"], "begin"),
        (sealed["train"], "load_vae"),
        (adapting, "_state"),  # over a base that fits
    ):
        monkeypatch.setattr(module, what, begin)
    argv = [word.format(**names) for word in line_of(name).split()]
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(Begun):
        sealed["train"].main()
    clear(place)


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
