"""Config files: loaded by running them, and refused in one line."""

import os

import pytest
from helpers import ROOT

from sit_jax.config import load
from sit_jax.errors import UserError


def test_load_runs_the_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return 3\n")
    assert load(file) == load(str(file)) == 3


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1\n", "{file}: it has no get_config()"),
        ("x = 1\ndef f(:\n", "{file}, line 2: SyntaxError: "),
        ("\nimport no_such_thing\n", "{file}, line 2: ModuleNotFoundError: No module"),
        (
            "from sit_jax.diffusion.paths import cubic\n",
            "{file}, line 1: ImportError: cannot",
        ),
        (
            "def get_config():\n    return 1 / 0\n",
            "{file}, line 2: ZeroDivisionError: ",
        ),
        (
            "from sit_jax.config import spec\nfrom sit_jax.models.dit import SiT\n"
            "def get_config():\n    return spec(SiT, dpeth=1)\n",
            "{file}, line 4: SiT has no field 'dpeth'; did you mean 'depth'?",
        ),
        ("raise ValueError\n", "{file}, line 1: ValueError: ValueError"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load(file)
    assert str(error.value).startswith(said.format(file=file))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_config_is_refused(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError, match="no config file at"):
            load(path)
    with pytest.raises(UserError, match=r"did you mean .*/sit_xl2.py\?"):
        load(ROOT / "configs" / "sit_xl_2.py")
    text = tmp_path / "config.txt"
    text.write_text("def get_config(): return 1")
    with pytest.raises(UserError, match="not a Python file"):
        load(text)
    binary = tmp_path / "binary.py"
    binary.write_bytes(os.urandom(64) + b"\0")
    with pytest.raises(UserError, match="binary.py"):
        load(binary)
