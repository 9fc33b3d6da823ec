"""One cause at a time is put between two bundles: the tool has to name it first."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import small
from helpers.networks import quick_jit

from sit_jax.cli import diagnose
from sit_jax.config import spec, to_json
from sit_jax.diagnosis import bundle, ladder, stages
from sit_jax.diagnosis.causes import find_causes
from sit_jax.diagnosis.report import diagnose as judge
from sit_jax.diagnosis.report import open_evidence
from sit_jax.experiment import build_experiment
from sit_jax.manifest import environment
from sit_jax.samplers.fixed_ode import FixedStepODE, euler, heun
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.run import build_context

STEPS, IMAGES = 6, 4
LISTED = np.repeat(np.arange(4, dtype=np.int32), 3)


def config(method=heun, channels=3, word="exact"):
    c = small.config(shape=(4, 4, 4), guidance=4.0, guidance_channels=channels)
    c.sampler = spec(FixedStepODE, method=method, steps=4)
    c.precision.model = word
    return c


@pytest.fixture(scope="module")
def tensors():
    params = small.random_params(build_experiment(config()), 0)
    rng = np.random.default_rng(1)
    kicked = lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32)
    return {"params": params, "ema": jax.tree.map(kicked, params)}


def corrupted(tensors):
    flat = flatten_dict(tensors["ema"], sep="/")
    kernel = np.array(flat["blocks/mlp/fc1/kernel"])
    kernel[1, 3] *= 1.5
    flat["blocks/mlp/fc1/kernel"] = kernel
    return {**tensors, "ema": unflatten_dict(flat, sep="/")}


OTHER_LABELS = np.random.default_rng(3).permutation(np.resize(np.arange(5), 12))
# name: what is done to B, the cause, the first stage beyond exact, in the verdict
CASES = {
    "bf16": (
        {"settings": {"word": "bf16"}},
        ("precision", "time embedding|patches", "24 and 8 bits (exact and bf16)"),
    ),
    "tf32": (
        {"emulate": "gpu-tf32"},
        ("precision", "time embedding", "24 and 11 bits"),
    ),
    "tpu": (
        {"emulate": "tpu-default"},
        ("precision", "time embedding", "24 and 8 bits"),
    ),
    "rounding": ({"rounding": "mdt"}, ("rounding", "uint8", "dit and mdt")),
    "channels": (
        {"settings": {"channels": 4}},
        ("guided channels", "guidance", "3 and 4"),
    ),
    "labels": (
        {"labels": np.int32(OTHER_LABELS)},
        ("labels", None, "listed and balanced; 9 of 12 differ"),
    ),
    "tensor": (
        {"weights": corrupted},
        ("weights", "block 1", "tensors differ: blocks/1/mlp/fc1/kernel"),
    ),
    "noise": ({"seed": 7}, ("noise", None, "job.seed: 0 and 7")),
    "solver": (
        {"settings": {"method": euler}},
        ("solver", f"{STEPS} steps", "fixed_ode.heun and samplers.fixed_ode.euler"),
    ),
    "raw": (
        {"item": "params"},
        ("weights", "time embedding", "the average (EMA) against the raw weights"),
    ),
}


@pytest.fixture(scope="module")
def made(tensors, tmp_path_factory):
    """made(name, ...) -> the path of a bundle; weights, job and inputs as asked."""
    folder = tmp_path_factory.mktemp("bundles")

    def make(name, given=None, weights=tensors, settings=None, **fields):
        fields = {"labels": LISTED, **fields}
        job = SamplingJob("w", to_json(config(**settings or {})), **fields)
        load = lambda item, parts, mesh: weights[item]
        context = build_context(job, types.SimpleNamespace(load=load, meta={}))
        stats = {"evaluations": {"min": 8, "mean": 8.0, "max": 8}, "unfinished": []}
        manifest = {"job": job.to_json(), **context.record, "stats": stats}
        manifest = json.loads(json.dumps(manifest | environment()))
        inputs, path = stages.make_inputs(context, IMAGES, given), folder / name
        bundle.write(stages.collect(context, manifest, path, inputs, steps=STEPS))
        return path

    with pytest.MonkeyPatch.context() as patch:
        for name in ("compute_activations", "compute_latents"):
            # compiling is what takes the time here
            quick = quick_jit(getattr(stages, name).__wrapped__, static_argnums=0)
            patch.setattr(stages, name, quick)
        yield make


@pytest.fixture(scope="module")
def good(made):
    return made("good")


def judged(good, other):
    return judge(open_evidence(good), open_evidence(other))


@pytest.mark.parametrize("name", CASES)
def test_diagnose_names_the_right_cause_first(name, good, made, tensors):
    changes, (cause, stage, said) = CASES[name]
    if "weights" in changes:
        changes = {**changes, "weights": changes["weights"](tensors)}
    found = judged(good, made(name, given=bundle.read(good), **changes))
    first = found["causes"][0]
    assert first["name"] == cause and not first["contradicted"], found["causes"]
    assert f"Likeliest cause: {cause} (" in found["verdict"]
    assert said in found["verdict"]
    inexact = [rung["stage"] for rung in found["ladder"] if rung["inexact"]]
    assert (inexact[0] in stage.split("|")) if stage else not inexact
    assert found["verdict"].startswith("Within noise") == (name == "noise")


def test_bundle_equals_itself(good, made):
    found = judged(good, made("again"))
    assert found["causes"] == [] and found["weights"]["differ"] == []
    assert found["first"] == ladder.EQUAL
    assert found["verdict"] == "Nothing differs that is known to move FID."
    names = [rung["stage"] for rung in found["ladder"]]
    network = ["time embedding", "label embedding", "patches", "patches + positions"]
    network += ["block 0", "block 1", "final layer"]
    rest = ["guidance", "one Euler step", f"{STEPS} steps", "decoded", "uint8"]
    assert names == ["noise", "labels", "times", *network, *rest]
    assert all(rung["cosine"] == pytest.approx(1) for rung in found["ladder"])


def test_own_inputs_differ_with_the_seed(good, made):
    found = judged(good, made("own noise", seed=7))
    assert found["first"] == "The discrepancy starts at noise, which is not the same."
    assert found["causes"][0]["name"] == "noise"


def test_stages_begin_at_the_noise_of_the_job(tmp_path):
    array = np.random.default_rng(0).standard_normal((6, 4, 4, 4), np.float32)
    np.save(tmp_path / "noise.npy", array)
    c = config()
    job = SamplingJob("w", to_json(c), np.arange(6), noise=str(tmp_path / "noise.npy"))
    context = types.SimpleNamespace(job=job, experiment=build_experiment(c))
    found = stages.make_inputs(context, 4)
    np.testing.assert_array_equal(found["noise"], array[:4])


def test_stages_are_those_of_the_network(good, tensors):
    """Against the model and the sampler called directly."""
    found = bundle.read(good)
    parts = build_experiment(config())
    x, t, y = (found.inputs[n] for n in ("noise", "t", "labels"))
    net = quick_jit(lambda y: parts.model.apply({"params": tensors["ema"]}, x, t, y))
    out, free = net(y), net(np.full_like(y, 5))
    guided = np.concatenate([(free + 4 * (out - free))[..., :3], out[..., 3:]], axis=-1)
    # float32 sums in other orders
    np.testing.assert_allclose(found.stages["guidance"], guided, rtol=1e-4, atol=1e-4)
    head = found.stages["final layer"].reshape(IMAGES, 2, 2, 2, 2, 8)
    head = head.transpose(0, 1, 3, 2, 4, 5).reshape(IMAGES, 4, 4, 8)[..., :4]
    np.testing.assert_allclose(head, out, rtol=1e-4, atol=1e-4)
    assert found.record["solver"] == {
        "method": "heun",
        "steps": STEPS,
        "evaluations": 2 * STEPS,
    }


def test_undeclared_difference_is_unexplained(good, tmp_path):
    """A network that computes something else from the same weights and settings."""
    found = bundle.read(good)
    odd = {**found.stages, "block 1": found.stages["block 1"] * 1.01}
    bundle.write(dataclasses.replace(found, path=tmp_path / "odd", stages=odd))
    found = judged(good, tmp_path / "odd")
    assert found["causes"][0]["name"] == "unexplained"
    assert found["first"].startswith("The discrepancy starts at block 1, which differs")


def test_undeclared_resize_is_named_by_its_stage(good, tmp_path):
    """Pictures that Inception sees otherwise, which no record tells of."""
    found, rng = bundle.read(good), np.random.default_rng(0)
    record = dict(found.record, stages=[*found.record["stages"], "resized", "features"])
    seen = {"resized": rng.standard_normal((IMAGES, 9, 9, 3), np.float32)}
    seen["features"] = rng.standard_normal((IMAGES, 8), np.float32)
    for name, change in (("a", 1.0), ("b", 1.02)):
        stages = found.stages | {n: x * np.float32(change) for n, x in seen.items()}
        path, odd = tmp_path / name, record | {"evaluation": {"resize": "TF1"}}
        bundle.write(dataclasses.replace(found, path=path, record=odd, stages=stages))
    told = judged(tmp_path / "a", tmp_path / "b")
    assert told["verdict"].startswith("Likeliest cause: resize (undeclared: resized is")
    assert told["first"].startswith("The discrepancy starts at resized")
    assert [rung["stage"] for rung in told["ladder"]][-4:] == [
        *("resized", "features", "mean of the features", "covariance of the features")
    ]
    # one side without features is no difference
    told = judged(good, tmp_path / "b")
    assert told["verdict"] == "Nothing differs that is known to move FID."


def test_declared_difference_without_effect_is_no_cause(good, made):
    """fast means nothing on a CPU."""
    found = judged(good, made("fast", settings=dict(word="fast")))
    assert [c["contradicted"] for c in found["causes"]] == [True]
    assert found["verdict"] == "Nothing differs that is known to move FID."


def test_causes_are_ordered_by_effect():
    """Of two declared causes, without any bundle."""
    one = {"job": {"guidance": 1, "labels": [0, 1, 1], "rounding": "dit"}}
    other = {"job": {**one["job"], "labels": [1, 0, 1], "rounding": "mdt"}}
    found = find_causes((one, other))
    assert [cause.name for cause in found] == ["labels", "rounding"]
    many = {"job": {**other["job"], "labels": [1, 0, 1, 1]}}
    assert find_causes((one, many))[0].name == "number of images"


def refused(call, message, out):
    code, _, err = call
    assert code == 2 and "\n" not in err.strip() and message in err, err
    assert not out.exists()


@pytest.fixture
def run(call):
    return functools.partial(call, diagnose)


def test_bundles_that_are_damaged_are_refused(good, made, tmp_path, run):
    out = tmp_path / "report"
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in bundle.FILES:
        (broken / name).write_bytes((good / name).read_bytes())
    whole = (broken / "arrays.npz").read_bytes()
    (broken / "arrays.npz").write_bytes(whole[:-9])
    refused(run(good, broken, "--out", out), "is no .npz file, or ends too early", out)
    (broken / "arrays.npz").unlink()
    refused(run(good, broken, "--out", out), "no file at", out)
    (broken / "bundle.json").write_text("{")
    refused(run(good, broken, "--out", out), "is no JSON", out)
    refused(run(good, tmp_path / "none", "--out", out), "none; name samples", out)
    refused(run(good, "--out", out), "name A and B and --out", out)
    found = bundle.read(good)
    record = {**found.record, "architecture": {"network": "DiT", "depth": 3}}
    bundle.write(dataclasses.replace(found, path=tmp_path / "other", record=record))
    refused(run(good, tmp_path / "other", "--out", out), "other architectures", out)


def test_commands_go_from_manifests_to_a_report(tmp_path, run):
    """Bundles of two manifests, then the report, as a user calls them."""
    weights = small.checkpoint(tmp_path / "w", config())
    stats = {"evaluations": {"min": 8, "mean": 8.0, "max": 8}, "unfinished": []}
    manifest = lambda seed: tmp_path / f"{seed}.npz.manifest.json"
    for seed in (0, 1):
        images = np.zeros((len(LISTED), 4, 4, 3), np.uint8)
        np.savez(tmp_path / f"{seed}.npz", arr_0=images)
        job = SamplingJob(str(weights), to_json(config()), LISTED, seed=seed)
        record = {"job": job.to_json(), "stats": stats}
        manifest(seed).write_text(json.dumps(record))
    few = ("--images", IMAGES, "--steps", STEPS)
    made, other = tmp_path / "0.npz.bundle", tmp_path / "b"
    code, out, err = run("--collect", made, "--from-manifest", manifest(0), *few)
    assert code == 0 and f"12 stages of {IMAGES} images" in out, err
    flags = ("--collect", other, "--from-manifest", manifest(1), *few)
    code, out, err = run(*flags, "--inputs", made)
    assert code == 0, err
    # samples with a bundle beside them, and a bundle
    code, out, err = run(tmp_path / "0.npz", other, "--out", tmp_path / "report")
    assert code == 0 and out.startswith("Within noise: only the noise differs"), err
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| block 1 | 0 | 0 | 1.000000 |" in page and "job.seed" in page
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["solver"][0]["samples"]["evaluations"]["mean"] == 8
    again = run(tmp_path / "0.npz", other, "--out", tmp_path / "report")
    assert again[0] == 2 and "--overwrite replaces it" in again[2]
    out = tmp_path / "c"
    flags = ("--collect", out, "--from-manifest")
    refused(
        run(*flags, manifest(1), "--images", 0),
        "--images 0: a whole number of at least 1",
        out,
    )
    refused(run(*flags, tmp_path / "x"), "no manifest to read", out)
