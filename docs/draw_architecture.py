"""Draw the import graph of `src/` for `architecture.md`: `images/architecture.svg`.

python docs/draw_architecture.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "images" / "architecture.svg"
PACKAGE = "keras_scratch_lstm"
SOURCE = ROOT / "src" / PACKAGE

# From the bottom up. A module imports lower layers and its own subpackage only.
LAYERS = (
    ("_types", "_validation", "_keras"),
    ("per_gate",),
    ("cell", "recurrence", "_bidirectional"),
    ("_litert", "cells"),
    ("layer",),
    ("convert", "metrics"),
    ("observing",),
    ("tracing", "callbacks"),
    ("experiments", "litert"),
    ("__main__", "plotting"),
    ("__init__",),
)
COLUMNS = {"convert": 0.12, "metrics": 0.88, "cells": 0.12, "_litert": 0.88}
COLUMNS |= {"plotting": 0.37, "experiments": 0.37, "litert": 0.12, "callbacks": 0.63}
COLUMNS |= {"__main__": 0.12}
WIDTH, ROW, BOX, TOP = 750, 70, (150, 40), (700, 40)
STYLE = """
  svg { --ink: #1b1f24; --card: #f3f4f6; --line: #8b949e; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6e9ed; --card: #2b303b; --line: #7d8590; }
  }
  rect { fill: var(--card); stroke: var(--line); }
  line { stroke: var(--line); stroke-width: 1.5; marker-end: url(#tip); }
  #tip path { fill: var(--line); }
  text { fill: var(--ink); text-anchor: middle; dominant-baseline: central;
    font: 15px ui-monospace, "DejaVu Sans Mono", monospace; }
"""


def module_imports():
    """Map each module of the package to the modules of the package it imports."""
    files = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        files[".".join(name)] = path
    return {name: _imports_of(path, files) for name, path in files.items()}


def _imports_of(path, modules):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            parent = rest.rpartition(".")[0]
            if package == PACKAGE:
                found |= {part for part in (rest, parent) if part in modules}
                if "." not in rest and rest not in modules:
                    found.add("__init__")  # a public name
    return {name for name in found if modules[name] != path}


def group(module):
    """The part of the diagram that a module belongs to."""
    return module.partition(".")[0]


def group_imports(imports):
    """`module_imports`, merged by subpackage."""
    merged = {}
    for module, targets in imports.items():
        names = merged.setdefault(group(module), set())
        names |= {group(target) for target in targets} - {group(module)}
    return merged


def _reachable(name, edges):
    found = set()
    for target in edges[name]:
        found |= {target} | _reachable(target, edges)
    return found


def direct(edges):
    """Drop each edge that a longer path implies."""
    return {
        name: {
            target
            for target in targets
            if not any(target in _reachable(other, edges) for other in targets)
        }
        for name, targets in edges.items()
    }


def main(path=PATH):
    base = set(LAYERS[0])
    edges = {
        name: targets - base
        for name, targets in group_imports(module_imports()).items()
        if name not in base
    }
    height = ROW * len(LAYERS)
    places = {}
    for row, names in enumerate(LAYERS):
        for column, name in enumerate(names):
            x = WIDTH * COLUMNS.get(name, (column + 0.5) / len(names))
            places[name] = x, height - ROW * (row + 0.5)
    half = BOX[1] / 2
    parts = []
    for name, targets in sorted(direct(edges).items()):
        for target in sorted(targets):
            (x, y), (x_to, y_to) = places[name], places[target]
            reach = _size(name)[0] / 2 - 20
            x = max(x - reach, min(x_to, x + reach))
            x_to += (x - x_to) * 0.3  # arrows from both sides stay apart
            parts.append(
                f'<line x1="{x:.0f}" y1="{y + half:.0f}" '
                f'x2="{x_to:.0f}" y2="{y_to - half - 3:.0f}"/>'
            )
    parts += [_box(PACKAGE if n == "__init__" else n, *p) for n, p in places.items()]
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'role="img">\n<title>Import graph: each module imports modules below it; all '
        f"may import the bottom row</title>\n<style>{STYLE}</style>\n"
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker>\n'
        + "\n".join(parts)
        + "\n</svg>\n",
        encoding="utf-8",
    )


def _size(name):
    return TOP if name in ("__init__", PACKAGE) else BOX


def _box(name, x, y):
    width, height = _size(name)
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width}" '
        f'height="{height}" rx="8"/><text x="{x:.0f}" y="{y:.0f}">{name}</text>'
    )


if __name__ == "__main__":
    main()
