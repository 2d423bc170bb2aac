"""The numbers that gate: sizes, doors and habits of the house. Each test lists every violation, not only the first."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import voxelstem
from voxelstem.table import Table

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "voxelstem"
FILES = sorted(SRC.rglob("*.py"))
TREES = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text()) for path in FILES}
MOST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS, MOST_PUBLIC_NAMES = 400, 60, 8, 12
HOMELESS = {"utils", "util", "common", "helpers", "helper", "base", "legacy", "misc"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno} {node.name}", node


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{name}:{node.lineno}", ast.unparse(node.func), node


def none_of(violations: Iterator[str] | list[str]) -> None:
    found = sorted(violations)
    assert not found, "\n  " + "\n  ".join(found)


def test_files_are_short():
    sizes = {path.relative_to(SRC).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    none_of(f"{name}: {size} lines, at most {MOST_LINES}" for name, size in sizes.items() if size > MOST_LINES)


def test_functions_are_short():
    sizes = ((where, (node.end_lineno or node.lineno) - node.lineno + 1) for where, node in functions())
    none_of(
        f"{where}: {size} lines, at most {MOST_FUNCTION_LINES}" for where, size in sizes if size > MOST_FUNCTION_LINES
    )


def test_functions_take_few_arguments():
    def count(node: Function) -> int:
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return sum(argument.arg not in ("self", "cls") for argument in named) + (node.args.vararg is not None)

    sizes = ((where, count(node)) for where, node in functions())
    none_of(f"{where}: {size} arguments, at most {MOST_ARGUMENTS}" for where, size in sizes if size > MOST_ARGUMENTS)


def test_no_function_passes_unnamed_keywords_through():
    none_of(f"{where}: **{node.args.kwarg.arg}" for where, node in functions() if node.args.kwarg)


def test_importing_the_package_takes_no_torch():
    code = "import sys, voxelstem; print([name for name in ('torch', 'monai', 'numpy') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_reading_and_storing_take_no_torch():
    code = "import sys, voxelstem; voxelstem.read, voxelstem.Store; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_the_front_door_is_small_and_every_name_opens():
    assert len(voxelstem.__all__) <= MOST_PUBLIC_NAMES
    none_of(name for name in voxelstem.__all__ if getattr(voxelstem, name) is None)


def tables() -> list[tuple[str, Table]]:
    modules = [
        module.name for module in pkgutil.walk_packages([str(SRC)], "voxelstem.") if "__main__" not in module.name
    ]
    members = [(name, vars(importlib.import_module(name))) for name in modules]
    return [(f"{name}.{key}", value) for name, own in members for key, value in own.items() if isinstance(value, Table)]


def test_every_table_line_resolves():
    found = tables()
    assert found, "no table was found: the search for them is broken"
    none_of(f"{where}['{name}']" for where, table in found for name in table if not callable(table[name]))


def test_every_module_has_its_mirrored_test():
    # A package's door and `python -m` hold no code of their own.
    modules = [Path(name) for name in TREES if Path(name).name not in ("__init__.py", "__main__.py")]
    mirrors = {module: ROOT / "tests" / module.with_name(f"test_{module.name}") for module in modules}
    none_of(f"{module}: no {mirror.relative_to(ROOT)}" for module, mirror in mirrors.items() if not mirror.exists())


def test_every_mirrored_test_has_its_module():
    alone = (
        "architecture",
        "bad_input",
        "bad_labels",
        "contracts",
        "end_to_end",
        "faults",
        "modes",
        "parity",
        "phantom_brains",
        "planted",
        "real_brains",
        "torchrun",
    )
    standing_alone = {f"test_{name}.py" for name in alone}
    tests = [path.relative_to(ROOT / "tests") for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    files = {test: test.name.removeprefix("test_").replace("init.py", "__init__.py") for test in tests}
    modules = {test: test.with_name(file).as_posix() for test, file in files.items()}
    none_of(
        f"tests/{test}: no src/voxelstem/{module}"
        for test, module in modules.items()
        if test.name not in standing_alone and module not in TREES
    )


def undocumented(name: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | Function) and not ast.get_docstring(node):
        yield name
    for child in getattr(node, "body", []) if isinstance(node, ast.Module | ast.ClassDef) else []:
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            yield from undocumented(f"{name}.{child.name}", child)


def test_every_public_name_is_documented():
    none_of(missing for name, tree in TREES.items() for missing in undocumented(name, tree))


def test_no_file_is_a_place_for_homeless_things():
    none_of(name for name in TREES if HOMELESS & set(re.split(r"[/._]", name)))


def test_no_except_catches_everything():
    handlers = (
        (name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)
    )
    broad = ("Exception", "BaseException")

    def passes_on(node: ast.ExceptHandler) -> bool:
        return isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None

    # Whatever a task raises in another process must come back to whoever asked, as it would without processes.
    boundary = {"workers.py"}
    none_of(
        f"{name}:{node.lineno}"
        for name, node in handlers
        if (node.type is None or any(isinstance(part, ast.Name) and part.id in broad for part in ast.walk(node.type)))
        and not passes_on(node)
        and name not in boundary
    )


def test_nothing_prints():
    none_of(where for where, function, _ in calls() if function == "print")


def test_every_file_with_code_begins_with_lazy_annotations():
    def begins(tree: ast.Module) -> bool:
        return any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body[:2])

    none_of(name for name, tree in TREES.items() if len(tree.body) > 1 and not begins(tree))


def test_no_pickle_is_read_outside_the_room_for_foreign_weights():
    def allowed(where: str, call: ast.Call) -> bool:
        only_weights = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
        return where.startswith("weights/") and only_weights

    none_of(where for where, function, call in calls() if function == "torch.load" and not allowed(where, call))
    # The name of the error alone reads nothing.
    words = re.compile(
        r"^\s*(import|from)\s+(pickle|dill|cloudpickle|joblib|shelve|marshal)\b(?! import UnpicklingError$)"
        r"|allow_pickle=True",
        re.MULTILINE,
    )
    # Tasks and answers between our own processes, through a pipe that nobody else holds; never a file.
    own_pipes = {"workers.py", "engine/shards.py"}
    names = (path.relative_to(SRC).as_posix() for path in FILES if words.search(path.read_text()))
    none_of(name for name in names if name not in own_pipes)


@pytest.mark.parametrize("folder", ["src", "tests", "docs", "benchmarks"])
def test_no_path_of_one_machine(folder: str):
    words = re.compile(r"(?<![\w.~])/(work|home|root|Users|mnt|opt)/\w")
    texts = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".toml", ".yml")]
    none_of(
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if words.search(line)
    )


def test_every_reason_for_a_refusal_is_explained():
    page = (ROOT / "docs" / "reference" / "reasons.md").read_text()
    literal = (
        (name, word.value.value)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "code" and isinstance(word.value, ast.Constant) and isinstance(word.value.value, str)
    )
    # Codes that stand in tables and in calls by position, beside their sentences.
    gates = re.findall(r'\(\s*(?:name, )?"([a-z]+(?:-[a-z]+)*)",\s+f?"', (SRC / "sources" / "gates.py").read_text())
    assert "localizer" in gates, "the search for the codes of gates.py is broken"
    codes = {code for _, code in literal if code} | set(gates)
    none_of(code for code in codes if f"`{code}`" not in page)
