"""Coverage-guided fuzzing of one reader: python tests/fuzzing/run.py pt --seconds 120

pip install -r requirements-slow.txt; what it finds lies in --keep, and belongs into
tests/test_fuzzing.py.
"""

import argparse
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
INSIDE = ["sit_jax", "zipfile", "json", "tarfile", "pickletools", "PIL"]
with atheris.instrument_imports(include=INSIDE):
    from fuzzing.readers import READERS, check


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", default=".cache/fuzzing", metavar="DIR")
    args = parser.parse_args()
    seeds = Path(args.keep) / args.reader
    seeds.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(READERS[args.reader][2]()):
        (seeds / f"seed{i}").write_bytes(data)
    limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=8192"]
    limits += [f"-max_total_time={args.seconds}", f"-artifact_prefix={seeds}-"]
    atheris.Setup(
        [sys.argv[0], str(seeds), *limits], lambda data: check(args.reader, data)
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
