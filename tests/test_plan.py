"""Plans: their sizes against arrays and published figures, and what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from sit_jax.models.dit import SiT
from sit_jax.models.mdt import MDTv2
from sit_jax.parallel.mesh import abstract_mesh, data_parallel, fsdp_groups
from sit_jax.planning import plan, pod, program
from sit_jax.planning.residuals import saved_bytes
from sit_jax.recipes import dit, sit


def made(config, count, **mesh):
    parts = program.training_recipe(config)
    return plan.plan(config, parts, abstract_mesh(count, **mesh))


def test_xl_on_256_chips_is_planned_here():
    c = sit()
    c.precision.training = "bf16"
    found = made(c, 256, data=2, fsdp=128)
    whole, each = found.items["optimizer"]
    assert found.parameters == 674_834_720
    assert whole == pytest.approx(8 * found.parameters, rel=1e-6)  # two moments
    assert whole / 256 <= each < 1.02 * whole / 256  # biases are whole
    weights, here = found.items["parameters"]
    assert weights / 128 <= here < 1.03 * weights / 128
    assert found.flops / c.batch_size == pytest.approx(711.7e9, rel=1e-3)
    assert not found.whole
    # 50 % of 459 TFLOP/s on 256 chips
    assert found.seconds(459e12, 0.5) == pytest.approx(711.7e9 / 459e12 * 2, rel=1e-3)


def test_what_stays_whole_is_said_with_a_mesh_that_splits_it():
    said = " ".join(plan.lines(made(sit(), 256), 0.5))
    assert "NOT SPLIT over fsdp" in said and "blocks/attn/qkv/kernel" in said
    assert "--config.mesh.data=16 --config.mesh.fsdp=16 splits all of it" in said


def test_pieces_that_a_tpu_cannot_gather_are_said_with_the_remedy():
    found = made(sit(), 128)
    (line,) = (s for s in plan.lines(found, 0.5, tpu=True) if "ADDED UP" in s)
    assert "fsdp 128 leaves 9 rows" in line and "blocks/attn/qkv/kernel" in line
    assert "--config.mesh.data=8 --config.mesh.fsdp=16 leaves whole tiles" in line
    assert not any("ADDED UP" in line for line in plan.lines(found, 0.5))


def test_the_usual_mesh_splits_xl_into_pieces_that_a_tpu_gathers():
    for count in (8, 16, 64, 256, 1024):
        found = made(sit(), count, **fsdp_groups())
        assert not found.whole and not found.ragged, count


def test_replicas_hold_the_weights_but_not_the_optimizer():
    items = made(dit(), 8, **data_parallel()).items
    assert items["parameters"][0] == items["parameters"][1]
    for name in ("gradients", "optimizer", "averages"):
        assert items[name][1] < 0.13 * items[name][0], name


def test_a_plan_in_words():
    c = small.config()
    found = made(c, 4)
    said = list(plan.lines(found, 0.5, peak=100e12, memory=16e9))
    total = float(next(line for line in said if line.startswith("total")).split()[-1])
    assert total == pytest.approx(found.bytes / 1e9, abs=1e-3)
    assert any("16.0 GB: 16.0 GB free" in line for line in said)
    assert any("DOES NOT FIT" in line for line in plan.lines(found, 0.5, memory=9))
    assert any("at 50% of 100 TFLOP/s" in line for line in said)


@pytest.mark.parametrize(
    "remat, by, each",
    [("dots", "xla", 166e6), ("dots", "head_by_head", 183e6), ("full", "xla", 17e6)],
)
def test_activations_of_xl_are_those_known(remat, by, each):
    """Counted before, by hand, for the 28 blocks alone; ends and losses come on top.

    By head also attention's results and log-sums, of 256 tokens and 16 heads.
    """
    model = SiT(dtype="bfloat16", remat=remat, attention=by)
    found = saved_bytes(model, (32, 32, 4), 2) / 2
    assert each < found < each + 5e6


def test_activations_grow_with_the_images_and_with_what_is_kept():
    size = dict(depth=2, width=64, heads=4, classes=5)
    of = lambda remat, n: saved_bytes(SiT(**size, remat=remat), (8, 8, 2), n)
    assert of("full", 8) == pytest.approx(2 * of("full", 4), rel=0.02)
    assert of("none", 8) > of("dots", 8) > of("full", 8)


def test_hidden_passes_are_counted():
    size = dict(depth=3, width=64, heads=4, classes=5, decoder=1, remat="full")
    both = saved_bytes(MDTv2(**size), (8, 8, 2), 4)
    plain = saved_bytes(
        MDTv2(**size, mask_ratio=None, mask_ratio_range=0.0), (8, 8, 2), 4
    )
    assert 1.5 * plain < both < 3 * plain


def limit(per_image, most):
    """A compiler that fits `most` bytes, and counts what it is asked for."""
    asked = []

    def compile_for(batch, device):
        asked.append(batch)
        free = most - per_image * batch
        if free < 0:
            return None
        return pod.Compiled(most, 0, most - free, 0, 0, 1.0, "")

    return compile_for, asked


@pytest.mark.parametrize("first", [8, 64, 4096])
def test_the_largest_batch_is_found_by_a_straight_line(monkeypatch, first):
    compile_for, asked = limit(per_image=10, most=5000)
    monkeypatch.setattr(pod, "compile_for", compile_for)
    known, said = {first: compile_for(first, None)}, []
    how = {"attempts": 12, "say": said.append}
    found = pod.largest_batch(lambda batch: batch, None, known, 8, **how)
    assert found == 496 and len(asked) <= 12  # 500 in multiples of 8
    assert "batch 496: 0.00 GB a chip free" in said and len(said) == len(asked) - 1


def test_libtpus_own_print_is_read_where_jaxlib_cannot(tmp_path):
    assert pod.printed(tmp_path) == ""
    for name, text in (("a", "short"), ("b", "the longest"), ("c", "")):
        (tmp_path / f"module.{name}.after_codegen.txt").write_text(text)
    (tmp_path / "module.before_optimizations.txt").write_text("longer than all others")
    assert pod.printed(tmp_path) == "the longest"


def test_no_batch_may_fit(monkeypatch):
    compile_for, _ = limit(per_image=10, most=5)
    monkeypatch.setattr(pod, "compile_for", compile_for)
    assert pod.largest_batch(lambda batch: batch, None, {8: None}, 8) == 0


@pytest.fixture
def run(monkeypatch, capsys):
    from sit_jax.cli import train

    def run(*arguments):
        config = small.ROOT / "tests" / "small_config.py"
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
    "chip": (["--chip=v8"], "no chip 'v8'; there are v3, v4"),
    "mfu": (["--mfu=1.5"], "--mfu 1.5"),
    "remat": (["--config.model.remat=some"], "remat is 'some'"),
    "precision": (["--config.precision.training=fp8"], "no precision 'fp8'"),
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

    config = small.ROOT / "tests" / "small_config.py"
    arguments = ("--config", config, "--topology", "v5e:4x4")
    code, _, err = small.called(train.main, monkeypatch, capsys, *arguments)
    assert code == 2 and "--topology goes with --plan" in err


def test_samples_are_planned_for_a_topology_only(monkeypatch, capsys):
    import sample

    call = lambda *a: small.called(sample.main, monkeypatch, capsys, "--plan", *a)
    code, _, err = call()
    assert code == 2 and "--plan needs --weights PATH or --config FILE" in err
    code, _, err = call("--config", small.ROOT / "tests" / "small_config.py")
    assert code == 2 and "--plan needs --topology" in err


def test_what_was_compiled_in_words_and_as_a_row():
    from test_hlo import TEXT

    made = pod.Compiled(16 * 10**9, 10**9, 2 * 10**9, 0, 10**9, 7.4, TEXT)
    assert "reckons" not in "\n".join(pod.lines(made))
    long = dataclasses.replace(made, text=TEXT.replace(':"100"', ':"125000"'))
    said = "\n".join(pod.lines(long, flops=459e9, kind="TPU v5p"))  # 1 ms at the peak
    assert "3.5 million cycles, 2.0 ms at 1.75 GHz, 50% MFU" in said
    assert "free 12.000 of 16.000\n2 arrays take" in said
    assert "f32 x f32 -> f32         highest     1" in said
    cells = pod.row("v5e:4x4", 1024, made).split(" | ")
    assert cells[:5] == ["| v5e:4x4", "1,024", "1.00", "2.00", "12.00"]
    assert len(cells) == len(pod.HEADER.split(" | ")) and cells[-1] == "7 |"
    unread = dataclasses.replace(made, text="")
    assert "cannot read" in list(pod.lines(unread))[-1]
    assert pod.row("v5e:4x4", 1024, unread).count("?") == 5
