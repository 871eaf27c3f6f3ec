"""The floors of the package: imports go down only, no file is in a circle, and nothing below the trainer knows it."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

from transformers import Seq2SeqTrainer, Trainer

PACKAGE = Path(__file__).parent.parent / "ctcd_trainer"
#: Folders and top files, lowest first. Those of one floor do not import each other.
FLOORS = (
    {"version", "graph", "model_structure", "recipes"},
    {"soft_losses", "feature_losses"},
    {"edges"},
    {"arguments"},
    {"tasks"},
    {"task", "losses"},
    {"checks", "students"},
    {"pair"},
    {"training", "saving", "cards"},
    {"hub"},
    {"push", "trainer"},
    {"aligning", "cross_fitting", "diagnose", "generations", "seq2seq"},
    {"__init__"},
)
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(name: str) -> set[str]:
    """The files of the package that a file imports anywhere, also in a function."""
    files = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = "/".join([*name.split("/")[: -node.level], *(node.module or "").split(".")]).rstrip("/")
            for each in node.names:  # a file, a folder, or something in one of them
                found = (f"{base}/{each.name}".lstrip("/"), f"{base}/{each.name}/__init__".lstrip("/"), base)
                files.add(next(f for f in (*found, f"{base}/__init__".lstrip("/")) if f in FILES))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(module.split(".")[0] == "ctcd_trainer" for module in modules), f"{name}: not relative"
    return files


def floor(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name.split("/")[0] in floor)


def test_imports_go_down_only():
    assert sorted(set().union(*FLOORS)) == sorted({name.split("/")[0] for name in FILES})
    edges = [(name, other) for name in FILES for other in imported(name)]
    assert len(edges) > 100
    assert [e for e in edges if e[0].split("/")[0] != e[1].split("/")[0] and floor(e[1]) >= floor(e[0])] == []


def test_no_file_imports_itself_through_others():
    TopologicalSorter({name: imported(name) for name in FILES}).prepare()


def test_nothing_below_the_trainer_is_given_the_trainer():
    forbidden = {"trainer", "Trainer", "CoDistillationTrainer", "CoDistillationMixin", "TYPE_CHECKING"}
    for name in (name for name in FILES if floor(name) < floor("trainer") or name == "push"):
        nodes = list(ast.walk(TREES[name]))
        known = {getattr(node, key, None) for node in nodes for key in ("id", "attr", "arg", "name")}
        assert not known & forbidden, name


def test_every_hook_of_trainer_is_overridden_in_one_class():
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    hooks = Counter(
        node.name
        for each in classes
        if each.name.startswith("CoDistillation") and each.name.endswith(("Mixin", "Trainer"))
        for node in each.body
        if isinstance(node, ast.FunctionDef) and (hasattr(Trainer, node.name) or hasattr(Seq2SeqTrainer, node.name))
    )
    assert len(hooks) > 20
    assert {name for name, count in hooks.items() if count > 1} == set()
