"""evaluate.py as it is used: lines, JSON, statistics files, and its refusals.

A toy stands for the Inception network; test_inception.py has the real one.
"""

import json
import re

import numpy as np
import pytest
from PIL import Image
from recorded import arrays, case
from small import called

import evaluate
from sit_jax import evaluation, summary
from sit_jax.errors import UserError
from sit_jax.evaluated import open_side
from sit_jax.evaluation import interval
from sit_jax.features import Extractor, pipeline
from sit_jax.image_sets import FolderImages
from sit_jax.inception_weights import Weights
from sit_jax.metrics import Gaussian, frechet
from sit_jax.metrics.manifold import precision_recall
from sit_jax.metrics.score import InceptionScore
from sit_jax.sharding import make_mesh

ENOUGH = 210  # images, where a covariance is said to need 205
LINES = ["Inception Score: ", "FID: ", "sFID: ", "Precision: ", "Recall: "]


def toy(params, images):
    """Features of an image's pixels, 12 of them, 6 and 5."""
    flat = images.reshape(len(images), -1).astype("float32") / 255
    return {"pool": flat @ params["w"], "spatial": flat[:, :6], "logits": flat[:, 6:11]}


def weights(seed=0, released=True):
    w = np.random.default_rng(seed).standard_normal((12, 12), np.float32)
    return Weights({"w": w}, None, str(seed) * 64, released)


def extractor(weights, mesh=None, batch_size=64):
    mesh = mesh or make_mesh(data=-1, fsdp=1)
    return Extractor(toy, weights.params, mesh, batch_size, pipeline(weights))


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Puts the toy in the network's place; set(weights) changes it, set(None) hides."""

    def set(found):
        def load(path):
            if found is None:
                raise UserError("no Inception weights; put x into y")
            return found

        monkeypatch.setattr(evaluate.inception_weights, "load", load)

    monkeypatch.setattr(evaluate, "inception_extractor", extractor)
    monkeypatch.setattr(evaluation, "LEAST", 205)
    set(weights())
    return set


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: called(evaluate.main, monkeypatch, capsys, *arguments)


def images(count, seed=0, bright=256):
    rng = np.random.default_rng(seed)
    return rng.integers(0, bright, (count, 2, 2, 3)).astype(np.uint8)


def npz(path, images, **more):
    np.savez(path, arr_0=images, **more)
    return path


@pytest.fixture
def sides(tmp_path):
    samples = npz(tmp_path / "s.npz", images(ENOUGH), arr_1=np.arange(ENOUGH))
    return samples, npz(tmp_path / "r.npz", images(ENOUGH, 1, 200))


def direct(ours, theirs):
    """The five figures of uint8 images, step by step."""
    params = weights().params
    a, b = (
        {n: np.asarray(x) for n, x in toy(params, i).items()} for i in (ours, theirs)
    )
    score = InceptionScore()
    score.add(a["logits"])
    far = lambda n: frechet(Gaussian.of(a[n]), Gaussian.of(b[n]))
    precision, recall = precision_recall(a["pool"], b["pool"])
    return [score.value(), far("pool"), far("spatial"), precision, recall]


def figures(text):
    """-> the numbers of ADM's five lines, which must be there and in order."""
    lines = [line for line in text.splitlines() if line.startswith(tuple(LINES))]
    assert [line.split(": ")[0] + ": " for line in lines] == LINES
    return [float(line.split(": ")[1]) for line in lines]


def record(path):
    return json.loads(path.with_name(f"{path.name}.evaluation.json").read_text())


def refused(found, message):
    code, out, err = found
    assert code == 2 and "\n" not in err.strip(), (code, out, err)
    assert re.search(message, err), err


# What it computes


def test_five_lines_and_a_json(sides, run):
    code, out, err = run(sides[0], "--reference", sides[1])
    assert code == 0
    want = direct(images(ENOUGH), images(ENOUGH, 1, 200))
    # float32 features of batches of another size: rounding
    assert figures(out) == pytest.approx(want, rel=1e-4)
    assert f"{ENOUGH} images: not comparable with a published FID-50K" in out
    found = record(sides[0])
    assert list(found["figures"].values()) == figures(out)
    assert found["samples"]["images"] == found["reference"]["images"] == ENOUGH
    assert found["samples"]["pipeline"] == pipeline(weights())
    assert found["environment"]["packages"]["jax"]


def test_adms_recorded_figures(tmp_path, run):
    golden, want = arrays("adm_eval"), case("adm_eval")["results"]
    flat = lambda x: x[..., :7].reshape(len(x), -1)
    for which in ("smp", "ref"):
        pool, rows = golden[which], len(golden[which])
        spatial = np.resize(flat(golden[f"spatial_{which}"]), (rows, 42))
        logits = pool @ golden["softmax_w"]
        np.savez(tmp_path / which, pool=pool, spatial=spatial, logits=logits)
    paths = ("--features", tmp_path / "smp.npz", "--reference", tmp_path / "ref.npz")
    code, out, _ = run(*paths, "--force")
    found = figures(out)
    assert code == 0
    assert found[0] == pytest.approx(
        want["inception_score_default_split5000"], rel=1e-6
    )
    assert found[1] == pytest.approx(want["fid"], rel=1e-6)
    assert found[3:] == [want["precision_f32"], want["recall_f32"]]


def test_a_folder_is_as_good_as_an_npz(tmp_path, run):
    ours, theirs = images(40), npz(tmp_path / "r.npz", images(50, 1, 200))
    (tmp_path / "s").mkdir()
    for i, image in enumerate(ours):
        Image.fromarray(image).save(tmp_path / "s" / f"{i:06d}.png")
    flags = ("--reference", theirs, "--force", "--batch-size", 16)
    _, one, _ = run(tmp_path / "s", *flags)
    _, other, _ = run(npz(tmp_path / "s.npz", ours), *flags)
    assert figures(one) == figures(other)
    assert (tmp_path / "s" / "evaluation.json").exists()


def test_adms_reference_gives_its_statistics(tmp_path, sides, run):
    """FID and sFID from the four arrays, precision and recall from the images."""
    rng = np.random.default_rng(0)
    mu, mu_s = rng.standard_normal(12), rng.standard_normal(6)
    known = {"mu": mu, "sigma": np.eye(12), "mu_s": mu_s, "sigma_s": 2 * np.eye(6)}
    reference = npz(tmp_path / "adm.npz", images(100, 1, 200), **known)
    code, out, _ = run(sides[0], "--reference", reference)
    assert code == 0
    assert (
        "adm.npz: FID from mu, sigma; sFID from mu_s, sigma_s; "
        "precision and recall from arr_0 (100 images)" in out
    )
    part = toy(weights().params, images(ENOUGH))
    found, want = figures(out), direct(images(ENOUGH), images(100, 1, 200))
    far = lambda a, mean, cov: frechet(Gaussian.of(np.asarray(a)), Gaussian(mean, cov))
    assert found[1] == pytest.approx(far(part["pool"], mu, np.eye(12)), rel=1e-4)
    assert found[2] == pytest.approx(
        far(part["spatial"], mu_s, 2 * np.eye(6)), rel=1e-4
    )
    assert found[3:] == pytest.approx(want[3:], abs=2 / ENOUGH)


def test_statistics_files_stand_for_their_images(tmp_path, sides, run):
    made = tmp_path / "ref.npz"
    code, out, _ = run("--stats", sides[1], "--out", made)
    assert (code, out) == (
        0,
        f"statistics of {ENOUGH} images, {ENOUGH} features of them {made}\n",
    )
    _, direct, _ = run(sides[0], "--reference", sides[1])
    _, out, _ = run(sides[0], "--reference", made, "--overwrite")
    assert figures(out) == pytest.approx(figures(direct), rel=1e-9)
    found = json.loads(str(np.load(made)["record"]))
    assert found["count"] == ENOUGH and found["pipeline"] == pipeline(weights())
    assert found["environment"]["platform"] == "cpu"


def test_a_reference_against_itself(sides, run):
    _, out, _ = run(sides[1], "--reference", sides[1])
    _, fid, sfid, precision, recall = figures(out)
    assert abs(fid) < 1e-3 and abs(sfid) < 1e-3
    assert (precision, recall) == (1, 1)


def test_kept_features_need_no_network(tmp_path, sides, run, network):
    kept, made = tmp_path / "f.npz", tmp_path / "ref.npz"
    _, first, _ = run(sides[0], "--reference", sides[1], "--save-features", kept)
    run("--stats", sides[1], "--out", made)
    network(None)
    code, again, _ = run("--features", kept, "--reference", made)
    assert code == 0
    assert figures(again) == pytest.approx(figures(first), rel=1e-9)


def test_the_kernel_distance_on_request(tmp_path, run):
    paths = npz(tmp_path / "s.npz", images(40)), npz(tmp_path / "r.npz", images(50, 1))
    code, out, _ = run(
        paths[0], "--reference", paths[1], "--metrics", "recall", "--kid"
    )
    found = record(paths[0])["figures"]
    assert code == 0 and f"KID: {found['kid']}" in out and "FID" not in out
    assert found["kid_subsets"] == [100, 40] and found["kid_std"] > 0


def test_other_features_have_a_distance_and_no_fid(tmp_path, run):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        features = np.random.default_rng(0).standard_normal((ENOUGH, 7)) + shift
        np.savez(tmp_path / name, features=features)
    paths = ("--features", tmp_path / "a.npz", "--reference", tmp_path / "b.npz")
    code, out, _ = run(*paths, "--metrics", "fid")
    assert code == 0 and "FID" not in out
    distance = float(re.search(r"^Frechet distance: (.*)$", out, re.M)[1])
    assert distance == pytest.approx(7 * 0.1**2, rel=1e-6)


def test_an_interval_on_request(sides, run):
    flags = ("--metrics", "fid", "--bootstrap", 20)
    _, out, _ = run(sides[0], "--reference", sides[1], *flags)
    low, high = record(sides[0])["figures"]["interval"]
    assert low < record(sides[0])["figures"]["fid"] < high
    assert "95 % of resamples of the samples: " in out


def test_intervals_are_as_wide_as_the_spread_of_fresh_samples():
    reference = Gaussian(np.full(4, 0.3), np.eye(4))
    draw = lambda seed: np.random.default_rng(seed).standard_normal((400, 4))
    found = [frechet(Gaussian.of(draw(seed)), reference) for seed in range(200)]
    low, high = interval(draw(1000), reference, 200)
    # 95 % of a normal distribution; 200 draws give its width to 5 %, one set to 15 %
    assert high - low == pytest.approx(3.92 * np.std(found), rel=0.3)
    assert low < frechet(Gaussian.of(draw(1000)), reference) < high


def test_intervals_lie_around_the_distance():
    """Of few images, all resamples are farther away than the images themselves."""
    features = np.random.default_rng(0).standard_normal((80, 20))
    reference = Gaussian(np.zeros(20), np.eye(20))
    value = frechet(Gaussian.of(features), reference)
    low, high = interval(features, reference, 50)
    assert low < value < high < 1.5 * value


def test_a_manifest_beside_the_samples_is_copied(sides, run):
    manifest = {"weights_sha256": "abc", "job": {"sampler": "heun", "labels": [0] * 99}}
    sides[0].with_name("s.npz.manifest.json").write_text(json.dumps(manifest))
    run(sides[0], "--reference", sides[1], "--metrics", "fid")
    found = record(sides[0])["samples"]["manifest"]
    assert found["weights_sha256"] == "abc"
    assert found["job"] == {"sampler": "heun", "labels": "99 values"}


def test_fid_during_training(tmp_path, sides, run):
    run("--stats", sides[1], "--out", tmp_path / "ref.npz")
    reference = summary.load(tmp_path / "ref.npz")
    batches = np.array_split(images(ENOUGH), 9)  # of unequal lengths
    found = evaluation.fid(iter(batches), extractor(weights()), reference)
    assert found == pytest.approx(
        direct(images(ENOUGH), images(ENOUGH, 1, 200))[1], 1e-4
    )
    with pytest.raises(UserError, match="another pipeline"):
        evaluation.fid(batches, extractor(weights(1, False)), reference)
    with pytest.raises(UserError, match="FID of 1 images"):
        evaluation.fid([images(1)], extractor(weights()), reference)


def test_only_50000_images_are_comparable():
    said = lambda count: evaluation.notes(count, ["fid"], {"fid": 2.0})
    assert said(50_000) == []
    assert said(10_000) == ["10000 images: not comparable with a published FID-50K"]
    assert evaluation.notes(10_000, ["precision"], {"precision": 1.0}) == []


# What it refuses


def test_few_images_need_force(tmp_path, sides, run):
    few = npz(tmp_path / "few.npz", images(204))
    refused(
        run(few, "--reference", sides[1]),
        r"few\.npz has 204 images; FID and sFID need 205 .*--force",
    )
    refused(run(sides[0], "--reference", few), r"few\.npz has 204 images")
    refused(run("--stats", few, "--out", tmp_path / "x.npz"), "few.npz has 204 images")
    code, out, _ = run(few, "--reference", sides[1], "--metrics", "precision,recall")
    assert code == 0 and "FID" not in out and "Recall: " in out
    assert run(few, "--reference", sides[1], "--force", "--overwrite")[0] == 0


def test_a_covariance_of_2048_features_needs_2048_images(tmp_path, monkeypatch):
    monkeypatch.undo()
    few, enough = (npz(tmp_path / f"{n}.npz", images(n)) for n in (2047, 2048))
    with pytest.raises(UserError, match="2047 images; FID and sFID need 2048"):
        evaluation.require_enough(["sfid"], open_side(enough), open_side(few))
    evaluation.require_enough(["fid"], open_side(enough))
    evaluation.require_enough(["precision"], open_side(few))


def test_another_pipeline_needs_force(tmp_path, sides, run, network):
    made = tmp_path / "ref.npz"
    run("--stats", sides[1], "--out", made)
    network(weights(1, released=False))
    message = "made by another pipeline .*weights: 0000.* not 1111.*--force"
    refused(run(sides[0], "--reference", made), message)
    assert run(sides[0], "--reference", made, "--force")[0] == 0


def test_files_that_do_not_say_what_made_them_need_force(tmp_path, sides, run):
    """pytorch-fid's hold mu and sigma, and its resize is another one."""
    path = tmp_path / "fid.npz"
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12))
    refused(run(sides[0], "--reference", path), "another pipeline .library unknown")
    code, out, _ = run(sides[0], "--reference", path, "--force")
    assert code == 0
    assert "lack what it takes: sFID, Precision, Recall" in out


def test_adms_statistics_go_with_the_released_weights_only(
    tmp_path, sides, run, network
):
    known = {"mu": np.zeros(12), "mu_s": np.zeros(6)}
    known |= {"sigma": np.eye(12), "sigma_s": np.eye(6)}
    reference = npz(tmp_path / "adm.npz", images(100), **known)
    network(weights(0, released=False))
    message = "library guided-diffusion; weights: of the released graph"
    refused(run(sides[0], "--reference", reference), message)


@pytest.mark.parametrize(
    "reference, message",
    [
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "has 9 pool features.* have 12"),
        (
            {"mu": np.zeros(9), "sigma": np.eye(8)},
            r"mu \[9\] and sigma \[8, 8\] are no",
        ),
        ({"mu": np.zeros(9)}, "has no array sigma"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "values that are no number"),
        ({"mu": np.array([None]), "sigma": np.eye(2)}, "holds Python objects"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "pool": np.ones((4, 3))},
            "different features",
        ),
        (
            {"features": np.ones((ENOUGH, 12))},
            "only one of .* of the Inception network",
        ),
        ({"labels": np.ones(3)}, "has no arr_0, only labels"),
    ],
    ids=["size", "shape", "half", "nan", "objects", "kept", "network", "nothing"],
)
def test_references_that_do_not_fit_are_refused(
    tmp_path, sides, run, reference, message
):
    np.savez(tmp_path / "bad.npz", allow_pickle=True, **reference)
    refused(run(sides[0], "--reference", tmp_path / "bad.npz"), message)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"images": images(9)}, "has no arr_0, only images"),
        ({"arr_0": images(9).astype(np.float32)}, "float32.*; images are uint8"),
        ({"arr_0": np.moveaxis(images(9), -1, 1)}, "channels first; transpose to NHWC"),
        ({"arr_0": np.array([{}])}, "holds Python objects"),
        (None, "is no .npz file, or ends too early"),
    ],
    ids=["name", "floats", "chw", "objects", "truncated"],
)
def test_bad_samples_leave_nothing_behind(tmp_path, sides, run, content, message):
    path = tmp_path / "bad.npz"
    if content is None:
        path.write_bytes(sides[0].read_bytes()[:-9])
    else:
        np.savez(path, allow_pickle=True, **content)
    before = sorted(tmp_path.rglob("*"))
    refused(run(path, "--reference", sides[1]), message)
    refused(run("--stats", path, "--out", tmp_path / "x.npz"), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_on_the_way_leaves_nothing_behind(tmp_path, sides, run):
    data = bytearray(sides[0].read_bytes())
    data[1000] ^= 255
    sides[0].write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    kept = ("--save-features", tmp_path / "f.npz")
    refused(run(sides[0], "--reference", sides[1], *kept), "arr_0 is damaged")
    refused(run("--stats", sides[0], "--out", tmp_path / "x.npz"), "arr_0 is damaged")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_weights(tmp_path, sides, run, network):
    """Needed for samples; where the reference has statistics, two lines are missing."""
    known = {"mu": np.zeros(12), "mu_s": np.zeros(6)}
    known |= {"sigma": np.eye(12), "sigma_s": np.eye(6)}
    reference = npz(tmp_path / "adm.npz", images(100), **known)
    kept = tmp_path / "f.npz"
    run(sides[0], "--reference", sides[1], "--save-features", kept)
    network(None)
    refused(run(sides[1], "--reference", sides[0]), "^script.py: no Inception weights")
    code, out, _ = run("--features", kept, "--reference", reference)
    assert code == 0 and "\nFID: " in out and "\nsFID: " in out
    assert "lack what it takes: Precision, Recall" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "name SAMPLES or --features"),
        (("s.npz", "--features", "f.npz"), "name SAMPLES or --features"),
        (("s.npz",), "--reference REF names"),
        (
            ("s.npz", "--reference", "r.npz", "--metrics", "fid,mind"),
            "no 'mind'; there",
        ),
        (
            ("s.npz", "--reference", "r.npz", "--batch-size", "0"),
            "--batch-size 0: a whole number of at le",
        ),
        (
            ("s.npz", "--reference", "r.npz", "--bootstrap", "3"),
            "--bootstrap 3: a whole number of at least",
        ),
        (
            ("s.npz", "--reference", "r.npz", "--config.x=1"),
            "this script has no config",
        ),
        (("--stats", "s.npz"), "--stats needs --out FILE.npz"),
        (("--stats", "s.npz", "--out", "x.json"), "--stats needs --out FILE.npz"),
        (
            ("--stats", "s.npz", "--out", "x.npz", "--reference", "r.npz"),
            "takes no reference",
        ),
        (("none.npz", "--reference", "r.npz"), "nothing at none.npz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_make_no_sense(tmp_path, monkeypatch, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments), message)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path, sides, run):
    flags = ("--reference", sides[1], "--metrics", "fid")
    run(sides[0], *flags)
    refused(run(sides[0], *flags), r"s\.npz\.evaluation\.json exists; --overwrite")
    assert run(sides[0], *flags, "--overwrite")[0] == 0
    made = ("--stats", sides[0], "--out", sides[1])
    refused(run(*made), r"r\.npz exists; --overwrite")
    run("--stats", sides[0], "--out", tmp_path / "x.npz")
    refused(run("--stats", tmp_path / "x.npz", "--out", tmp_path / "y.npz"), "already")


def test_a_folder_that_cannot_be_written_is_refused_at_once(
    tmp_path, sides, run, network, monkeypatch
):
    network(None)  # which it would say, had it come so far
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    found = run(sides[0], "--reference", sides[1], "--out", tmp_path / "locked" / "x")
    refused(found, r"locked is not writable; name another place")


# What a kill leaves


class Run:
    """The toy, of which batch `last` kills; counts the images that it has seen."""

    def __init__(self, monkeypatch):
        self.last, self.seen = None, 0
        monkeypatch.setattr(evaluate, "inception_extractor", self._made)

    def _made(self, *words):
        whole, made = self, extractor(*words)

        class Dying(Extractor):
            def __call__(self, batches):
                for number, features in enumerate(super().__call__(batches)):
                    if number == whole.last:
                        raise KeyboardInterrupt
                    whole.seen += len(features["pool"])
                    yield features

        fields = ("params", "mesh", "batch_size", "pipeline")
        return Dying(toy, *(getattr(made, name) for name in fields))


def swept(folder):
    """-> {name: bytes} of the files in a folder, which are removed."""
    found = {}
    for path in folder.iterdir():
        found[path.name] = path.read_bytes()
        path.unlink()
    return found


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def words(sides, place):
    """Samples in 14 batches against a reference in 14."""
    flags = ("--batch-size", 16, "--out", place / "x.json")
    flags += ("--kid", "--save-features", place / "f.npz")
    return (sides[0], "--reference", sides[1], *flags)


def test_a_killed_evaluation_goes_on_to_the_same_bytes(place, words, run, monkeypatch):
    toy = Run(monkeypatch)
    assert run(*words)[0] == 0
    unbroken, toy.seen = swept(place), 0
    assert unbroken.keys() == {"x.json", "f.npz"}
    for toy.last in (3, 5):
        assert run(*words)[0] == 130
    toy.last = None
    with monkeypatch.context() as patch:  # killed while the figures are computed
        patch.setattr(evaluation, "figures", stopped)
        code, out, _ = run(*words)
    assert code == 130 and "8 of 14 batches of samples are there" in out
    assert (place / "f.npz").exists()  # which the same run may write again
    assert toy.seen == 2 * ENOUGH
    code, out, _ = run(*words)
    assert code == 0 and "14 of 14 batches of reference are there" in out
    assert toy.seen == 2 * ENOUGH and swept(place) == unbroken


def stopped(*words):
    raise KeyboardInterrupt


def test_a_killed_reference_goes_on_to_the_same_bytes(place, sides, run, monkeypatch):
    toy = Run(monkeypatch)
    words = ("--stats", sides[1], "--batch-size", 16, "--out", place / "ref.npz")
    assert run(*words)[0] == 0
    unbroken, toy.seen, toy.last = swept(place), 0, 6
    assert run(*words)[0] == 130
    toy.last = None
    assert run(*words)[0] == 0
    assert toy.seen == ENOUGH and swept(place) == unbroken


@pytest.mark.parametrize("change", ["images", "weights", "batches", "a bit", "nothing"])
def test_parts_of_anything_else_are_named_and_made_again(
    place, sides, words, run, network, monkeypatch, change
):
    toy = Run(monkeypatch)
    toy.last = 6
    assert run(*words)[0] == 130
    parts, flags, lost = place / "x.json.samples.parts", (), 6 * 16
    if change == "images":
        npz(sides[0], images(ENOUGH, seed=5))
    elif change == "weights":
        network(weights(7))
    elif change == "batches":
        flags = ("--batch-size", 24)
    elif change == "a bit":
        path, lost = parts / "000003.npz", 16
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    else:
        lost = 0
    toy.last = None
    code, _, err = run(*words, *flags)
    assert code == 0 and toy.seen == 2 * ENOUGH + lost
    if change == "nothing":
        assert not err
    elif change == "a bit":
        assert f"WARNING: {path} is damaged" in err
        found = swept(place)
        assert run(*words)[0] == 0 and swept(place) == found
    else:
        assert f"WARNING: {parts} holds parts of another run, which are removed" in err


def test_a_folder_that_changes_is_another_one(tmp_path):
    for i, image in enumerate(images(4)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    seen = {FolderImages(tmp_path).identity}
    (tmp_path / "0.png").rename(tmp_path / "9.png")
    seen.add(FolderImages(tmp_path).identity)
    Image.fromarray(images(1, 3)[0]).save(tmp_path / "1.png")
    seen.add(FolderImages(tmp_path).identity)
    assert len(seen) == 3
