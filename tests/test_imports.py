"""Imports point downward only: which package may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "clip",
    "common",
    "configs",
    "datasets",
    "engine",
    "models",
    "scripts",
    "tests",
    "train_vision",
    "test_vision",
    "hubconf",
)

# The first prefix that fits a module says which of our modules it may import.
ALLOWED = {
    "common": ("common",),
    "configs": ("configs", "common"),
    "clip": ("clip", "common", "configs.schema"),
    "models": ("models", "clip", "common", "configs"),
    "engine": ("engine", "common", "configs.schema", "configs.compare"),
    "datasets": ("datasets", "common", "configs.schema"),
    "scripts": (
        "scripts",
        "train_vision",
        "test_vision",
        "clip",
        "models",
        "engine",
        "datasets",
        "common",
        "configs",
    ),
    "hubconf": ("models", "engine", "configs"),
    "train_vision": ("models", "engine", "datasets.build", "configs", "common"),
    "test_vision": ("models", "engine", "datasets.build", "configs", "common"),
}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0].removesuffix(".py") in PACKAGES]
PRODUCT = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def imports(path: Path):
    """(line, module) of every import, with `from package import module` resolved where it is a module of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                assert alias.name != "*", f"{path}:{node.lineno}: star import"
                inner = ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")
                yield node.lineno, f"{node.module}.{alias.name}" if inner.is_file() else node.module


@pytest.mark.parametrize("path", PRODUCT, ids=module_name)
def test_arrows(path):
    name = module_name(path)
    rule = next((prefix for prefix in ALLOWED if within(name, prefix)), None)
    if rule is None:
        assert name in ("configs",), f"{name} has no rule"
        return
    for line, imported in imports(path):
        if imported.split(".")[0] in PACKAGES:
            assert any(within(imported, prefix) for prefix in ALLOWED[rule]), (
                f"{path}:{line}: {name} must not import {imported}"
            )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_module_rules(path):
    """A module docstring, open_clip imported only where its models are built and read, no star imports, no globals."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not path.read_text().strip(), f"{path} has no docstring"
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], path
    names = {imported.split(".")[0] for _, imported in imports(path)}
    if "open_clip" in names:
        assert module_name(path) in (
            "clip.towers.openclip_vit",
            "clip.text_head",
            "clip.towers.weights",
            "tests.clip.towers.test_openclip_vit",
            "tests.clip.test_text_head",
        )
