"""port_weights.py as it is used: both directions, its report, and its refusals."""

import hashlib
import os
import re
import shutil
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT
from helpers.recorded import FOLDER, weights
from helpers.small import script

from sit_jax.cli import port_weights
from sit_jax.convert import tensor_files
from sit_jax.convert.rules import DIT_RULES, to_flax
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.manifest import weights_hash

BARE = FOLDER / "weights" / "sit_a.pt"
FULL = FOLDER / "weights" / "train_sit_full.pt"
SIT_A = ("--family", "sit", "--heads", 4)
PLAIN = ROOT / "tests" / "plain_torch"


@pytest.fixture
def port(call):
    return partial(call, port_weights)


@pytest.fixture(scope="module")
def ported(tmp_path_factory):
    """sit_a.pt and train_sit_full.pt as checkpoints, for tests that only read."""
    folder = tmp_path_factory.mktemp("ported")
    for name, source, flags in (("bare", BARE, SIT_A), ("full", FULL, ("--heads", 2))):
        with pytest.MonkeyPatch.context() as patch:
            words = ["port_weights.py", source, folder / name, *flags]
            patch.setattr("sys.argv", list(map(str, words)))
            with pytest.raises(SystemExit, match="^0$"):
                port_weights.main()
    return folder


def test_released_file_goes_in_and_out(tmp_path, port):
    code, out, err = port(BARE, tmp_path / "ck", *SIT_A)
    assert (code, err) == (0, "")
    assert "SiT: depth 2, width 40, heads 4, patch 2" in out
    assert re.search(
        r"blocks\.\*\.attn\.qkv\.weight +2 +\(120, 40\) +"
        r"blocks/attn/qkv/kernel +\(2, 40, 120\)",
        out,
    )
    assert re.search(r"^pos_embed +1 +\(1, 16, 40\) +\(constant, spare\)$", out, re.M)
    for part in ("model", "ema"):
        assert re.search(rf"^{part} +32 +\w{{64}}$", out, re.M)
    assert f"{hashlib.sha256(BARE.read_bytes()).hexdigest()}  {BARE}" in out
    params, _ = to_flax(DIT_RULES, weights("sit_a"))
    assert f"{weights_hash(params)}  ema, as sample.py's" in out
    assert re.search(r"^[\d.]+ s, peak memory [\d.]+ GB$", out, re.M)
    code, out, err = port(tmp_path / "ck", tmp_path / "x.pt")
    assert (code, err) == (0, "")
    assert "written: the EMA alone, for the checkpoint has no opt_state" in out
    back = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(back) == list(weights("sit_a"))
    for name, array in weights("sit_a").items():
        np.testing.assert_array_equal(back[name], array)


def test_run_of_the_original_goes_out_as_it_came(tmp_path, port, ported):
    code, out, _ = port(ported / "full", tmp_path / "x.pt")
    assert code == 0
    assert re.search(r"^exp_avg_sq +31 +\w{64}$", out, re.M)
    ours, theirs = read_torch_file(tmp_path / "x.pt"), read_torch_file(FULL)
    assert (ours.layout, ours.args, ours.adam.group) == (
        theirs.layout,
        theirs.args,
        theirs.adam.group,
    )
    for part, state in theirs.parts().items():
        for name, array in state.items():
            np.testing.assert_array_equal(ours.parts()[part][name], array)


def test_safetensors_hold_the_ema(tmp_path, port, ported):
    code, out, _ = port(ported / "full", tmp_path / "x.safetensors")
    assert code == 0
    assert "the EMA alone, for a .safetensors holds one state dict" in out
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    theirs = read_torch_file(FULL).ema
    assert read.keys() == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(read[name], theirs[name])
    code, _, _ = port(
        tmp_path / "x.safetensors", tmp_path / "ck", "--family", "sit", "--heads", 2
    )
    assert code == 0


def test_overwrite_replaces_only_a_checkpoint_directory(tmp_path, port, ported):
    shutil.copytree(ported / "bare", tmp_path / "ck")
    assert port(BARE, tmp_path / "ck", *SIT_A)[0] == 2
    assert port(BARE, tmp_path / "ck", *SIT_A, "--overwrite")[0] == 0
    assert os.listdir(tmp_path) == ["ck"]
    (tmp_path / "ck" / "notes.txt").touch()
    code, _, err = port(BARE, tmp_path / "ck", *SIT_A, "--overwrite")
    assert code == 2
    assert "not overwritten: it also holds notes.txt" in err
    assert (tmp_path / "ck" / "0" / "ema").is_dir()


def test_file_that_comes_back_different_is_not_kept(
    tmp_path, port, ported, monkeypatch
):
    real = tensor_files.write

    def wrong(path, content):
        content["final_layer.linear.bias"][3] += 1
        real(path, content)
        content["final_layer.linear.bias"][3] -= 1

    monkeypatch.setattr(tensor_files, "write", wrong)
    code, _, err = port(ported / "bare", tmp_path / "x.pt")
    assert code == 2
    assert "ema: final_layer.linear.bias came back different" in err
    assert list(tmp_path.iterdir()) == []


def test_step_can_be_chosen(tmp_path, port, ported):
    shutil.copytree(ported / "full", tmp_path / "ck")
    shutil.copytree(tmp_path / "ck" / "20", tmp_path / "ck" / "40")
    assert f"{tmp_path}/ck/40" in port(tmp_path / "ck", tmp_path / "x.pt")[1]
    out = port(tmp_path / "ck", tmp_path / "y.pt", "--step", 20)[1]
    assert f"{tmp_path}/ck/20" in out


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_the_networks_are_compared_stage_by_stage(tmp_path, port, family):
    source = FOLDER / "weights" / f"{family}_a.pt"
    flags = ("--family", family, "--heads", 4, "--reference", PLAIN)
    code, out, _ = port(source, tmp_path / "ck", *flags)
    assert code == 0
    stages = dict(re.findall(r"^([a-z ]+\d?) +([\d.]+e[+-]\d\d)$", out, re.M))
    stages = {name.strip(): float(value) for name, value in stages.items()}
    names = ["patches", "time and label", "block 0", "block 1", "final layer", "output"]
    assert list(stages) == names
    # float32 rounding; DiT's times go to 999, where the last bit of a frequency counts
    assert max(stages.values()) < (2e-6 if family == "sit" else 2e-5)


def test_a_network_that_computes_something_else_is_seen(tmp_path, port):
    (tmp_path / "clone").mkdir()
    code = (PLAIN / "models.py").read_text()
    wrong = code.replace("* (1 + scale2) + shift2", "* (1 + shift2) + scale2")
    (tmp_path / "clone" / "models.py").write_text(wrong)
    flags = (*SIT_A, "--reference", tmp_path / "clone")
    out = port(BARE, tmp_path / "ck", *flags)[1]
    value = lambda stage: float(re.search(rf"^{stage} +(\S+)$", out, re.M)[1])
    assert value("time and label") < 1e-6
    assert value("block 0") > 1e-2


def clone(folder, text):
    folder.mkdir()
    (folder / "models.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([BARE], "required: TARGET"),
        ([BARE, "OUT.pt"], "both torch files; name a directory"),
        (["BARE", "OUT"], "both directories; name a .pt"),
        ([BARE, "OUT"], "add --family sit or --family dit"),
        ([BARE, "OUT", "--family", "sit"], "divisor of width 40: 1, 2, 4"),
        ([FULL, "OUT", "--family", "dit"], "--family says dit, but .* says sit"),
        ([BARE, "OUT", *SIT_A, "--step", "3"], "--step is for a checkpoint"),
        ([BARE, "OUT", *SIT_A, "--config.seed=1"], "changes a --config, and none"),
        ([BARE, "OUT", "--config", "configs/dit.py:S/2"], "the config does not fit"),
        (
            ["BARE", "OUT.pt", "--family", "sit"],
            "--family is for a torch file: .* own config",
        ),
    ],
)
def test_mistake_is_one_line(tmp_path, port, ported, arguments, told):
    places = {"OUT": tmp_path / "out", "OUT.pt": tmp_path / "out.pt"}
    places |= {"BARE": ported / "bare", "EMPTY": tmp_path / "empty"}
    places["EMPTY"].mkdir()
    words = [places.get(word, word) for word in arguments]
    code, out, err = port(*words)
    assert code == 2
    assert re.search(told, err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.pt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_port_weights_touches_no_accelerator():
    code = "import port_weights, jax; print(jax.config.jax_platforms)"
    without = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    assert script("-c", code, env=without).stdout.strip() == "cpu"
