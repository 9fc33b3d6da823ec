"""Which classes are drawn: at random, in equal numbers, listed, from a file."""

import numpy as np
import pytest

from sit_jax.diffusion import rng
from sit_jax.errors import UserError
from sit_jax.sampling.labels import make_labels


def test_random_ones_follow_from_seed_and_number():
    expected = rng.sample_labels(rng.image_keys(3, np.arange(20)), 10)
    np.testing.assert_array_equal(make_labels("random", 20, 10, 3), expected)
    np.testing.assert_array_equal(
        make_labels(None, 20, 10, 3)[:5], make_labels(None, 5, 10, 3)
    )


def test_balanced_and_listed():
    found = make_labels("balanced", 25, 10, 0)
    assert np.bincount(found).tolist() == [3] * 5 + [2] * 5
    assert make_labels("balanced", None, 4, 0).tolist() == [0, 1, 2, 3]
    assert make_labels("7,2", 6, 10, 0).tolist() == [7, 7, 7, 2, 2, 2]
    assert make_labels("7,2", None, 10, 0).dtype == np.int32


def test_files(tmp_path):
    np.save(tmp_path / "a.npy", np.array([3, 1, 2]))
    (tmp_path / "b.txt").write_text("3\n1\n2\n")
    for name in ("a.npy", "b.txt"):
        assert make_labels(str(tmp_path / name), None, 10, 0).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "content, said",
    [
        (np.array([1, 10]), "10 is not a class; there are 0..9"),
        (np.array([1.5]), "no list of whole numbers"),
        (np.array([], int), "has no labels"),
        (np.array([print], object), "Object arrays cannot be loaded"),
    ],
    ids=["unknown class", "floats", "empty", "code"],
)
def test_files_that_are_no_labels(tmp_path, content, said):
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(UserError, match=said):
        make_labels(str(tmp_path / "a.npy"), None, 10, 0)


@pytest.mark.parametrize(
    "word, number, said",
    [
        ("3,4", 3, "3 is not divisible by the 2 labels"),
        ("3,10", None, "10 is not a class"),
        ("cat", None, "random, balanced, classes"),
        ("no.npy", None, "no file at no.npy"),
        ("random", 0, "--num 0: at least 1"),
    ],
)
def test_words_that_are_no_labels(word, number, said):
    with pytest.raises(UserError, match=said):
        make_labels(word, number, 10, 0)


def test_a_number_that_is_not_the_files(tmp_path):
    np.save(tmp_path / "a.npy", np.array([3, 1, 2]))
    with pytest.raises(UserError, match="--num 2, but .* has 3 labels"):
        make_labels(str(tmp_path / "a.npy"), 2, 10, 0)
