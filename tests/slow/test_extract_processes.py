"""extract_features.py in real processes: two at once, killed, and once more.

Half a minute: pytest tests/slow/test_extract_processes.py
"""

import signal
import subprocess
import sys
import time

from helpers import ROOT, pictures

from sit_jax.data.latent_cache import LatentCache

RUN = """
import time
from sit_jax.cli import extract_features
from helpers.codecs import toy

slow = {slow}
read = extract_features.ImageFolder.read
extract_features.ImageFolder.read = lambda s, i: (time.sleep(slow), read(s, i))[1]
extract_features.load_codec = lambda vae, precision: toy()
extract_features.main()
"""
IMAGES = 240


def begin(root, out, *words, slow=0.0):
    arguments = [
        *("--data", root, "--vae", "x", "--size", 8, "--out", out, "--shards", 12),
        *("--batch-size", 8, *words),
    ]
    command = [sys.executable, "-c", RUN.format(slow=slow), *map(str, arguments)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipe)


def end(process):
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def contents(path):
    files = (file for file in path.iterdir() if file.name != "manifest.json")
    return {file.name: file.read_bytes() for file in files}


def test_two_processes_and_a_kill_give_what_one_gives(tmp_path):
    root = pictures.folder(tmp_path / "images", each=IMAGES // 3, size=(10, 8))
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    assert f"{IMAGES} images in {one}, 0 corrupt" in end(begin(root, one))
    both = [begin(root, two, "--process", i, "--processes", 2) for i in range(2)]
    assert sum("waits for the shards" in end(each) for each in both) <= 1
    process = begin(root, killed, slow=0.02)
    while len(list(killed.glob("moments-*"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(list(killed.glob("moments-*")))
    assert 2 <= kept < 12 and not (killed / "cache.json").exists()
    said = end(begin(root, killed, "--workers", 2))
    assert f"\n{IMAGES - 20 * kept} images in " in said
    assert contents(one) == contents(two) == contents(killed)
    assert len(contents(one)) == 14 and len(LatentCache(one)) == IMAGES
