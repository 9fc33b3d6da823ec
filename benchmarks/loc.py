"""Prints code lines (no blanks, comments, docstrings) and all lines, by package."""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_lines(text):
    """Numbers of the lines that hold code."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines.difference_update(range(first.lineno, first.end_lineno + 1))
    return lines


def package_of(path):
    """The row of the table that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "sit_jax":
        return f"sit_jax/{parts[1]}" if len(parts) > 2 else "sit_jax (top)"
    return (
        "scripts and configs" if parts[0] == "configs" or len(parts) == 1 else parts[0]
    )


def main():
    product, tests = Counter(), Counter()
    files, all_lines = Counter(), Counter()
    folders = ["sit_jax", "configs", "tests", "benchmarks", "examples"]
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    for path in sorted([*paths, *ROOT.glob("*.py")]):
        text, package = path.read_text(), package_of(path)
        count = product if package.startswith("s") else tests
        count[package] += len(code_lines(text))
        files[package] += 1
        all_lines[package] += len(text.splitlines())
    print(f"{'':24}{'files':>6}{'code':>8}{'all':>8}")
    for name, lines in [*sorted(product.items()), *sorted(tests.items())]:
        print(f"{name:24}{files[name]:6}{lines:8}{all_lines[name]:8}")
    print(f"{'product':24}{sum(files[n] for n in product):6}{product.total():8}")


if __name__ == "__main__":
    sys.exit(main())
