"""What README and docs point to is there: links, files, flags, fields, names."""

import re
from functools import cache
from pathlib import Path

import pytest
from helpers.small import flags_of

from sit_jax.config import load

ROOT = Path(__file__).parents[1]
GENERATED = {"docs/reference/flags.md", "docs/reference/fields.md"}  # by make docs
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in sorted(PAGES)}
PAGES = {name: text for name, text in PAGES.items() if name not in GENERATED}
PARTS = ("", "benchmarks", "configs", "docs", "launch", "sit_jax", "tests")
FILES = [
    str(path.relative_to(ROOT))
    for part in PARTS
    for path in (ROOT / part).glob("**/*" if part else "*")
    if path.is_file()
]
# what commands write, and what stands for any name
MADE = {"x.pt.md", "report.md", "commit_success.txt", "log.txt"}
# --config.x is below; the others are other programs'
NOT_HERE = ("--config.", "--xla_", "--lr_anneal_steps")
THEIRS = {"sample_ddp.py", "evaluator.py"}  # scripts of the originals
ORIGINALS = set(  # flags of SiT's and DiT's scripts, in tables of what became of them
    "--nproc_per_node --model --data-path --image-size --num-classes --epochs --ckpt "
    "--global-batch-size --global-seed --ckpt-every --log-every --path-type "
    "--prediction --loss-weight --sampling-method --num-fid-samples".split()
)
TABLES = {"README.md", "docs/start/from-pytorch.md"}  # where these stand
OURS = set(  # no modules
    "config.clip manifest.json config.json evaluation.json metrics.jsonl".split()
)
CHOSEN = {"process.loss_weight.most"}  # there once a file has chosen such an object


def spans(text):
    """The code of a page: what is between backticks, and whole lines of blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    lines = [
        line.partition(" #")[0]
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return lines, re.findall(r"`([^`]+)`", rest)


def calls(code):
    """-> [(script, its words)] of a line or span; None for words before any script."""
    script, words, found = None, [], []
    for word in code.replace("\\|", " ").split():
        path = word.strip("(),;")
        if path in SCRIPTS:
            found.append((script, words))
            script, words = path, []
        words.append(word.strip("(),;'\""))
    return [*found, (script, words)]


def words_of(page):
    lines, inline = spans(PAGES[page])
    return [call for code in (*lines, *inline) for call in calls(code)]


SCRIPTS = [name for name in FILES if re.fullmatch(r"(benchmarks/)?\w+\.py", name)]


@cache
def flags(script):
    if "/" not in script:
        return flags_of(script.removesuffix(".py"))
    return set(re.findall(r"\"(--[\w-]+)\"", (ROOT / script).read_text()))


@cache
def config(name):
    return load(ROOT / name)


def has_field(node, names):
    for name in names:
        if not hasattr(node, "keys") or name not in node:
            return False
        node = node[name]
    return True


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith("http"):
            target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
            is_made = str(target.relative_to(ROOT)) in GENERATED
            assert target.exists() or is_made, link
    lines, inline = spans(PAGES[page])
    for code in (*lines, *inline):
        for name in re.findall(
            r"(?<![\w.*{}/-])[\w./-]+\.(?:py|sh|md|yaml|txt)\b", code
        ):
            known = name in MADE | THEIRS or any(
                f"/{each}".endswith(f"/{name}") for each in FILES
            )
            assert known, f"{name} in `{code}`"


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    """A page has one job; README has 900 words and CONTRIBUTING what it needs."""
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", PAGES[page], flags=re.S | re.M)
    words = [word for word in prose.split() if re.search(r"\w", word)]
    most = {"README.md": 900, "CONTRIBUTING.md": 1500}.get(page, 800)
    assert len(words) <= most


def test_shelves_have_the_pages_of_the_site():
    nav = re.findall(r"^ +- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {name for name in PAGES if name.startswith("docs/")} | GENERATED
    assert {f"docs/{name}" for name in nav} == pages


def test_pages_that_code_names_are_there():
    for name in FILES:
        if name.endswith((".py", ".sh", ".yaml")):
            for page in re.findall(r"\bdocs/[\w/-]+\.md", (ROOT / name).read_text()):
                assert (ROOT / page).exists() or page in GENERATED, f"{page} in {name}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_take_their_flags(page):
    for script, words in words_of(page):
        if script is None and words and not words[0].startswith("-"):
            continue  # of another program: pip, ruff, XLA_FLAGS=
        for word in words:
            flag = re.match(r"--[a-z][\w-]*", word)
            if not flag or word.startswith(NOT_HERE):
                continue
            if page in TABLES and flag[0] in ORIGINALS:
                continue
            known = [script] if script else SCRIPTS
            assert any(flag[0] in flags(each) for each in known), (script, word)


@pytest.mark.parametrize("page", PAGES)
def test_configs_have_the_fields_that_are_set(page):
    for _, words in words_of(page):
        named = [w for w in words if re.fullmatch(r"configs/[a-z]\w*\.py", w)]
        for word in words:
            if field := re.match(r"--config\.([\w.]+)", word):
                names = field[1].strip(".").split(".")
                if field[1] in CHOSEN:
                    continue
                there = named or [n for n in FILES if re.match(r"configs/[a-z]", n)]
                assert any(has_field(config(each), names) for each in there), word


@pytest.mark.parametrize("page", PAGES)
def test_names_of_modules_are_in_them(page):
    """`multihost.barrier`, `training.adan`: as written, of our own modules."""
    modules = {}
    for name in FILES:
        if name.startswith("sit_jax/") and name.endswith(".py"):
            modules.setdefault(Path(name).stem, []).append((ROOT / name).read_text())
    for code in spans(PAGES[page])[1]:
        if match := re.fullmatch(
            r"(?:sit_jax\.)?(\w+)\.(?!py$|md$)(\w+)(?:\(.*\))?", code
        ):
            module, name = match.groups()
            if module in modules and f"{module}.{name}" not in OURS:
                found = any(re.search(rf"\b{name}\b", text) for text in modules[module])
                assert found, code
