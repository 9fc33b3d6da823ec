"""Plans: their sizes against arrays and published figures, and what they refuse."""

import jax
import numpy as np
import pytest
from helpers import small
from test_tpu_compile import TEXT

from sit_jax.errors import UserError
from sit_jax.parallel import mesh as mesh_lib
from sit_jax.planning import programs
from sit_jax.planning.memory import plan_memory
from sit_jax.planning.report import plan_sampling
from sit_jax.planning.tpu_compile import TPUProgram, describe_program
from sit_jax.recipes import dit, sit


def made(config, count, **mesh):
    parts = programs.build_training_experiment(config)
    return plan_memory(config, parts, mesh_lib.abstract_mesh(count, **mesh))


def test_xl_on_256_chips_is_planned_here():
    c = sit()
    c.precision.training = "bf16"
    found = made(c, 256, data=2, fsdp=128)
    whole, each = found.items["optimizer"]
    assert found.num_parameters == 674_834_720
    assert whole == pytest.approx(8 * found.num_parameters, rel=1e-6)  # two moments
    assert whole / 256 <= each < 1.02 * whole / 256  # biases are whole
    weights, here = found.items["parameters"]
    assert weights / 128 <= here < 1.03 * weights / 128
    assert found.flops / c.batch_size == pytest.approx(711.7e9, rel=1e-3)
    assert not found.unsplit
    said = list(found.describe(0.5, "TPU v5p", None))
    assert said[-1].startswith("at 50% of 459 TFLOP/s: 0.003101 s a step")


def test_what_stays_whole_is_said_with_a_mesh_that_splits_it():
    said = " ".join(made(sit(), 256).describe(0.5, "H100", None))
    assert "NOT SPLIT over fsdp" in said and "blocks/attn/qkv/kernel" in said
    assert "--config.mesh.data=16 --config.mesh.fsdp=16 splits all of it" in said


def test_pieces_that_a_tpu_cannot_gather_are_said_with_the_remedy():
    found = made(sit(), 128)
    (line,) = (s for s in found.describe(0.5, "TPU v5p", None) if "ADDED UP" in s)
    assert "fsdp 128 leaves 9 rows" in line and "blocks/attn/qkv/kernel" in line
    assert "--config.mesh.data=8 --config.mesh.fsdp=16 leaves whole tiles" in line
    assert not any("ADDED UP" in line for line in found.describe(0.5, "H100", None))


def test_the_usual_mesh_splits_xl_into_pieces_that_a_tpu_gathers():
    for count in (8, 64, 256):
        found = made(sit(), count, **mesh_lib.fsdp_groups())
        assert not found.unsplit and not found.ragged, count


def test_replicas_hold_the_weights_but_not_the_optimizer():
    items = made(dit(), 8, **mesh_lib.data_parallel()).items
    assert items["parameters"][0] == items["parameters"][1]
    for name in ("gradients", "optimizer", "EMA"):
        assert items[name][1] < 0.13 * items[name][0], name


def test_a_plan_in_words():
    c = small.config()
    found = made(c, 4)
    said = list(found.describe(0.5, "A100", 16e9))
    total = float(next(line for line in said if line.startswith("total")).split()[-1])
    assert total == pytest.approx(found.device_bytes / 1e9, abs=1e-3)
    assert any("16.0 GB: 16.0 GB free" in line for line in said)
    assert any("DOES NOT FIT" in line for line in found.describe(0.5, "A100", 9))
    assert any("at 50% of 312 TFLOP/s" in line for line in said)


@pytest.fixture
def run(monkeypatch, capsys):
    from sit_jax.cli import train

    def run(*arguments):
        config = small.ROOT / "tests" / "helpers" / "small_config.py"
        where = ("--config", config, "--plan")
        return small.called(train.main, monkeypatch, capsys, *where, *arguments)

    return run


def test_train_prints_a_plan_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = len(jax.live_arrays())
    code, out, err = run("--devices", "4", "--chip", "v5e", "--mfu", "0.4")
    assert (code, err) == (0, "")
    assert "on 4 devices" in out and "at 40% of 197 TFLOP/s" in out
    assert not list(tmp_path.iterdir())
    held = sum(np.size(array) for array in jax.live_arrays()[before:])
    assert held < 1000  # keys and the like


BAD = {
    "devices": (["--devices=0"], "--devices 0: a whole number of at least 1"),
    "batch": (["--devices=16"], "batch_size 8 is not divisible by 16"),
    "mesh": (["--devices=4", "--config.mesh.tensor=3"], "does not make up 4 devices"),
    "chip": (["--chip=v8"], "no chip 'v8'; there are B200, H200"),
    "mfu": (["--mfu=1.5"], "--mfu 1.5"),
    "topology": (["--topology=v9:2x2"], "no topology 'v9:2x2'; there are v4:2x2x1"),
    "slices": (["--topology=v5e:4x4*some"], "no topology 'v5e:4x4*some'"),
    "both": (["--topology=v5e:4x4", "--devices=16"], "give it alone"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, name):
    arguments, said = BAD[name]
    code, _, err = run(*arguments)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_without_libtpu_the_remedy_is_named(run, monkeypatch):
    from importlib import util

    found = util.find_spec
    absent = lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    monkeypatch.setattr(util, "find_spec", absent)
    code, _, err = run("--topology=v5e:4x4")
    assert code == 2 and "pip install libtpu" in err and len(err.splitlines()) == 1


def test_flags_of_a_plan_need_one(monkeypatch, capsys):
    from sit_jax.cli import train

    config = small.ROOT / "tests" / "helpers" / "small_config.py"
    arguments = ("--config", config, "--topology", "v5e:4x4")
    code, _, err = small.called(train.main, monkeypatch, capsys, *arguments)
    assert code == 2 and "--topology goes with --plan" in err


def test_compiled_program_is_described():
    text = TEXT.replace(':"100"', ':"125000"')
    program = TPUProgram(16 * 10**9, 10**9, 2 * 10**9, 0, 10**9, 7.4, text)
    assert "reckons" not in "\n".join(describe_program(program))
    said = "\n".join(describe_program(program, 459e9, "TPU v5p"))  # 1 ms at the peak
    assert "3.5 million cycles, 2.0 ms at 1.75 GHz, 50% MFU" in said
    assert "free 12.000 of 16.000\n" in said


def test_samples_are_planned_for_a_topology_only():
    with pytest.raises(UserError, match="--plan needs --topology here"):
        next(plan_sampling(small.config(), 4, topology=None))
