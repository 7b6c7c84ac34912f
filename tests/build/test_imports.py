"""Which way imports go: no circle, and the rooms keep to themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import fbkernels

ROOT = Path(fbkernels.__file__).parent
MODULES = {".".join(("fbkernels", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in ROOT.rglob("*.py")}
MODULES = {name: path for name, path in MODULES.items() if not name.startswith(("fbkernels.bench", "fbkernels.kernels"))}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports when it is imported: not for types alone, and not in a function."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if isinstance(node, ast.Import):
                found.update(a.name for a in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [a.name for a in node.names if a.name != "_C"]  # the compiled part
                found.update(f"{node.module}.{n}" if f"{node.module}.{n}" in MODULES else node.module for n in names)
            elif isinstance(node, (ast.If, ast.Try)):
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    return found & MODULES.keys()


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def test_no_circle() -> None:
    left = dict(GRAPH)
    while left:
        done = [name for name, needs in left.items() if not needs & left.keys()]
        assert done, f"a circle among {sorted(left)}"
        for name in done:
            del left[name]


def test_rooms() -> None:
    for name, needs in GRAPH.items():
        room = name.split(".")[1] if "." in name else ""
        for other in needs:
            other_room = other.split(".")[1] if "." in other else ""
            assert not (room != "lab" and other_room == "lab"), f"{name} imports {other}"
            assert not (room == "stream" and other_room == "training"), f"{name} imports {other}"
            assert not (room == "rules" and other_room == "training"), f"{name} imports {other}"
            assert not (room == "ops" and other_room in ("training", "stream", "rules")), f"{name} imports {other}"


def test_no_name_of_another_files_own() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fbkernels"):
                private = [
                    a.name for a in node.names if a.name.startswith("_") and f"{node.module}.{a.name}" not in MODULES and a.name != "_C"
                ]
                assert not private, f"{name} imports {private} from {node.module}"
