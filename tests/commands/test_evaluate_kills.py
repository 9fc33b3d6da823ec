"""evaluate.py killed: the same command goes on to the same bytes."""

import pytest
from helpers import toy_inception
from helpers.toy_inception import ENOUGH, images, npz, toy, weights
from PIL import Image

from sit_jax.cli import evaluate
from sit_jax.evaluation import evaluate as evaluation
from sit_jax.evaluation.features import FeatureExtractor
from sit_jax.evaluation.image_sets import FolderImages

network, run, sides = toy_inception.network, toy_inception.run, toy_inception.sides


class Run:
    """The toy, of which batch `last` kills; counts the images that it has seen."""

    def __init__(self, monkeypatch):
        self.last, self.seen = None, 0
        make = evaluate.get_extractor
        monkeypatch.setattr(
            evaluate, "get_extractor", lambda *words: self._made(make(*words))
        )

    def _made(self, made):
        whole = self

        class Dying(FeatureExtractor):
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
        patch.setattr(evaluation, "compute_figures", stopped)
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
