"""Imports point one way, and modules and functions stay small."""

import ast
import graphlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 50
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

pytestmark = pytest.mark.one_backend


@pytest.fixture(scope="module")
def diagram():
    path = ROOT / "docs" / "draw_architecture.py"
    spec = importlib.util.spec_from_file_location("draw_architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_have_no_cycle(diagram):
    imports = diagram.module_imports()
    assert imports["layer"] >= {"cell", "recurrence"}
    # Importing a submodule runs its package first, which is no cycle of the code.
    for module, targets in imports.items():
        imports[module] = {t for t in targets if not module.startswith(f"{t}.")}
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError


def test_imports_point_to_lower_layers(diagram):
    level = {name: k for k, names in enumerate(diagram.LAYERS) for name in names}
    imports, bottom = diagram.module_imports(), diagram.LAYERS[0]
    assert {diagram.group(module) for module in imports} == set(level)
    upward = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in targets
        if diagram.group(target) != diagram.group(module)
        and level[diagram.group(target)] + (diagram.group(module) not in bottom)
        > level[diagram.group(module)]
    ]
    assert upward == []


def test_diagram_is_up_to_date(diagram, tmp_path):
    diagram.main(tmp_path / "architecture.svg")
    drawn = (tmp_path / "architecture.svg").read_text()
    assert drawn == diagram.PATH.read_text(), "run python docs/draw_architecture.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_and_functions_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS):
            assert code_lines(node, lines) <= MAX_FUNCTION_LINES, node.name


def code_lines(function, lines):
    """Count the lines of a body, without docstring, comments and blank lines.

    Nested functions, such as those of a custom gradient, are counted on their own.
    """
    skipped = [node for node in ast.walk(function) if isinstance(node, FUNCTIONS)][1:]
    if ast.get_docstring(function) is not None:
        skipped.append(function.body[0])
    numbers = set(range(function.body[0].lineno, function.end_lineno + 1))
    for node in skipped:
        numbers -= set(range(node.lineno, node.end_lineno + 1))
    code = (lines[number - 1].strip() for number in numbers)
    return sum(bool(line) and not line.startswith("#") for line in code)
