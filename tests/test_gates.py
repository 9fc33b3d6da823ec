"""What process 0 does alone must not compile, compute together or wait for others.

The sources are read: from each place that only one process reaches, every call is
followed through our own files. A method is looked for by its name, among the classes of
the file that calls it and of those that it imports from. What is found there of JAX may
only ask, not compute. Otherwise the other processes would wait, forever.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASKS = {"first", "index", "process_index", "is_leader"}  # who am I
HARMLESS = set(
    "process_index process_count devices local_devices device_count "
    "local_device_count ShapeDtypeStruct eval_shape keystr leaves flatten map "
    "tree_leaves_with_path tree_map_with_path structure".split()
)
LIBRARIES = {"jax", "jnp", "lax", "multihost_utils", "optax", "diffrax", "ocp"}
TOGETHER = {
    "exchange",
    "wait",
    "told",
    "told_array",
    "require_same",
    "require_same_files",
    "require_shared",
    "stop_at",
}
# methods of files, threads and arrays that happen to be called like some of ours
COMMON = set(
    "add append begin close end get items join keys load map open read save update "
    "values write".split()
)


class Source:
    """A file: functions and classes by name, and what its names stand for elsewhere."""

    def __init__(self, path):
        self.tree = ast.parse(path.read_text())
        self.names, self.methods = {}, defaultdict(list)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = alias.asname or alias.name
                    self.names[name] = (node.module, alias.name)
            elif isinstance(node, ast.ClassDef):
                for each in node.body:
                    if isinstance(each, ast.FunctionDef):
                        self.methods[each.name].append(each)
        kinds = ast.FunctionDef | ast.ClassDef
        self.functions = {n.name: n for n in self.tree.body if isinstance(n, kinds)}


def sources():
    files = [*ROOT.glob("*.py"), *(ROOT / "sit_jax").rglob("*.py")]
    dotted = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return {dotted(path).removesuffix(".__init__"): Source(path) for path in files}


def asks(test):
    return any(
        isinstance(node, ast.Call) and name_of(node).split(".")[-1] in ASKS
        for node in ast.walk(test)
    )


def name_of(call):
    """Of what is called, with dots; "" of what has no name."""
    parts, node = [], call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def gated(tree):
    """-> nodes that are reached, or not, by the number of the process."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and asks(node.test):
            found += [node.body, node.orelse]
        for block in (getattr(node, name, None) for name in ("body", "orelse")):
            for i, each in enumerate(block if isinstance(block, list) else ()):
                if not isinstance(each, ast.If) or not asks(each.test):
                    continue
                found += [*each.body, *each.orelse]
                if isinstance(each.body[-1], ast.Return | ast.Continue | ast.Break):
                    found += block[i + 1 :]
    return found


def reached(files, nodes, module):
    """-> {(what is called, by whom)} from these nodes on, through our own files."""
    todo, seen, found = [(module, node) for node in nodes], set(), set()
    while todo:
        where, node = todo.pop()
        for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
            name = name_of(call)
            found.add((name, where))
            for there, function in meant(files, where, name):
                if id(function) not in seen:
                    seen.add(id(function))
                    todo.append((there, function))
    return found


def meant(files, where, name):
    """-> our functions, classes and methods that a call may mean, and their files."""
    source, (first, *rest) = files[where], name.split(".")
    if not rest and first in source.functions:
        return [(where, source.functions[first])]
    if first in source.names:
        module, original = source.names[first]
        inner = f"{module}.{original}"
        if rest and inner in files:  # a module of ours
            module, original = inner, rest[0]
        function = module in files and files[module].functions.get(original)
        return [(module, function)] if function else []
    if not rest or first in LIBRARIES or rest[-1] in COMMON:
        return []
    modules = {where} | {module for module, _ in source.names.values()}
    return [
        (module, method)
        for module in modules & set(files)
        for method in files[module].methods.get(rest[-1], ())
    ]


def forbidden(calls):
    """Those of them that compile, compute or wait."""
    wrong = set()
    for name, where in calls:
        first, last = name.split(".")[0], name.split(".")[-1]
        together = first == "hosts" and last in TOGETHER
        if (first in LIBRARIES and last not in HARMLESS) or together:
            wrong.add(f"{where}: {name}")
    return sorted(wrong)


FILES = sources()


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("def f():\n if hosts.first():\n  jax.jit(g)", ["m: jax.jit"]),
        ("def f():\n if not hosts.first():\n  return\n h()\ndef h():\n jnp.sum(1)", 1),
        ("def f():\n x = jnp.ones(3) if jax.process_index() == 0 else None", 1),
        ("def f():\n if hosts.first():\n  print(1)\n else:\n  hosts.wait()", 1),
        ("def f():\n x = jnp.ones(3)\n if hosts.first():\n  print(x)", 0),
        ("def f():\n if hosts.first():\n  save(jax.device_count())", 0),
    ],
)
def test_the_reader_finds_what_it_shall(tmp_path, text, wrong):
    file = tmp_path / "m.py"
    file.write_text(text)
    files = {"m": Source(file)}
    found = forbidden(reached(files, gated(files["m"].tree), "m"))
    assert found == wrong if isinstance(wrong, list) else len(found) == wrong


def test_the_gates_are_seen():
    """Or the tests below would prove nothing."""
    gates = {name for name, source in FILES.items() if gated(source.tree)}
    assert {"train", "evaluate", "sit_jax.sampling", "sit_jax.logging"} <= gates


@pytest.mark.parametrize("module", [m for m in sorted(FILES) if m != "sit_jax.hosts"])
def test_no_process_computes_alone(module):
    nodes = gated(FILES[module].tree)
    assert not forbidden(reached(FILES, nodes, module))


@pytest.mark.parametrize("module", ["sit_jax.logging", "sit_jax.tracking"])
def test_the_log_of_process_0_computes_nothing(module):
    nodes = list(FILES[module].functions.values())
    assert not forbidden(reached(FILES, nodes, module))
