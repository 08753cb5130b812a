"""The documentation is true: links, paths, commands and keys exist, and the printed Python runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.schema import ALIASES, Config, load_config
from models import registry

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
PACKAGES = ("clip", "common", "configs", "datasets", "docs", "engine", "models", "scripts", "tests")
EXAMPLES = {"models/frame_difference.py", "configs/hmdb51/frame_difference.yaml"}  # files that own_model.md writes
LAUNCHED = {
    "run_train_vision.sh": "train_vision.py",
    "run_test_vision.sh": "test_vision.py",
    "slurm.sh": "train_vision.py",
}

# Words that no other project uses in this sense; in two halves, so that this file passes.
DIALECT = [" ".join(words) for words in (("lives", "here"), ("live", "here"), ("takes it", "up"), ("what is", "tuned"),
                                         ("kept for", "backward"), ("said", "plainly"))] + ["an" + "ew"]  # fmt: skip

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language, without the indentation that a list gives them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def code(page: Path) -> str:
    """All code of a page: fenced blocks and inline code, an item a line."""
    text = page.read_text()
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*fenced, *inline])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


def braces(text: str) -> list[str]:
    """`a{b,c}` -> ab, ac, as a shell expands it."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


@pages
def test_named_files_exist(page):
    pattern = rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})/[\w./{{}},*-]*[\w/}}*]|(?<![\w/.-])\w+\.(?:py|cff|sh)\b"
    for named in re.findall(pattern, code(page)):
        for path in braces(named):
            if path not in EXAMPLES and "/" in path:
                assert list(ROOT.glob(path)), f"{page.name} names {path}"


def commands(page: Path) -> list[str]:
    """Every command in the code of a page, continuation lines joined, comments removed."""
    text = re.sub(r"\\\n\s*", " ", code(page))
    lines = [re.sub(r"\s#.*", "", line).strip() for line in text.splitlines()]
    starts = r"(?:[A-Z_]+=\S+ )*(?:python3? |bash |sbatch )"
    return [line for line in lines if re.match(starts, line)]


def sources(command: str) -> list[Path] | None:
    """The Python files that parse a command's arguments; None for programs of others. Fails for unknown ones."""
    if module := re.search(r"python3? -m ([\w.]+)", command):
        name = module[1]
        path = ROOT.joinpath(*name.split("."))
        if name.split(".")[0] not in PACKAGES:
            return None
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"no module {name}: {command}"
        return [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.rglob("*.py"))
    script = re.search(r"(?:python3?|bash|sbatch) ([\w./]+\.(?:py|sh))", command)
    assert script, f"neither a module nor a script: {command}"
    path = ROOT / script[1]
    assert path.is_file(), f"no file {script[1]}: {command}"
    if path.name in LAUNCHED:
        return [ROOT / LAUNCHED[path.name]]
    if path.suffix == ".sh":
        return [file for file in (path, path.with_suffix(".py"), ROOT / "scripts/environment.sh") if file.is_file()]
    return [path]


@pages
def test_commands_and_their_options_exist(page):
    for command in commands(page):
        files = sources(command)
        if files is None:
            continue
        text = "\n".join(file.read_text() for file in files)
        for option in re.findall(r"(?<=\s)--[\w-]+", command):
            assert re.search(rf"{option}(?![\w-])", text), f"{page.name}: {option} is no option of {command}"


def known_keys(cls: type = Config, prefix: str = "") -> set[str]:
    """Every dotted key of a configuration."""
    keys = set()
    for name, kind in typing.get_type_hints(cls).items():
        keys.add(f"{prefix}{name}")
        for inner in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(inner):
                keys |= known_keys(inner, f"{prefix}{name}.")
    return keys


@pages
def test_named_keys_exist(page):
    options = {field.name for module in registry.MODELS.values() for field in dataclasses.fields(module.Options)}
    known = known_keys() | set(ALIASES) | {f"network.options.{name}" for name in options}
    sections = "data|network|solver|logging|checkpoint"
    for key in re.findall(rf"(?<![\w./-])(?:{sections})(?:\.[a-zA-Z_]+)+(?![\w/(-])", code(page)):
        assert key in known or key.endswith((".py", ".md", ".pt")), f"{page.name} names the key {key}"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1500


def test_readme_python_runs_as_printed():
    (program,) = blocks(ROOT / "README.md", "python")
    lines = [line for line in program.splitlines() if line.strip()]
    assert len(lines) == 6
    promised = re.search(r"# .*?(torch\.Size\(.*\))$", lines[-1])[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == promised


def example(number: int) -> types.ModuleType:
    """A model that own_model.md prints, as a module."""
    programs = [text for text in blocks(ROOT / "docs/own_model.md", "python") if "def build(" in text]
    module = types.ModuleType(f"own_model_{number}")
    sys.modules[module.__name__] = module  # where dataclasses look for the names in annotations
    exec(programs[number], module.__dict__)
    return module


@pytest.mark.parametrize("number", [0, 1], ids=["without CLIP", "on a frozen tower"])
def test_own_model_runs(number, monkeypatch):
    module = example(number)
    monkeypatch.setitem(registry.MODELS, "mine", module)
    vision = {"width": 32, "layers": 2, "heads": 2, "patch_size": 16, "image_size": 32}
    data = {"dataset": "mine", "style": "kinetics", "num_classes": 3, "num_segments": 4, "input_size": 32}
    network = {"model": "mine", "init": False, "arch": "custom", "vision": vision}
    model = registry.build_model(load_config({"data": data, "network": network}))
    assert isinstance(model, nn.Module) and model.frames_per_segment == 2 - number
    logits = model(torch.randn(2, 4 * model.frames_per_segment, 3, 32, 32))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    trained = {id(p) for part in model.trainable_modules().values()
               for p in (part.parameters() if isinstance(part, nn.Module) else [part])}  # fmt: skip
    assert trained == {id(p) for p in model.parameters() if p.grad is not None}


def tree_of(page: Path) -> set[str]:
    """The paths of the tree that a page draws with two spaces a level; folders end with a slash."""
    fenced = re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    (tree,) = (text for text in fenced if text.startswith("train_vision.py"))
    paths, parents = set(), []
    for line in filter(None, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        paths.add("".join(parents))
    return paths


def test_tree_names_every_module():
    """A line for every module, or for the folder that holds it, and for nothing that does not exist."""
    named = tree_of(ROOT / "docs/design.md")
    assert not [path for path in named if not (ROOT / path).exists()]
    leaves = [path for path in named if not any(other != path and other.startswith(path) for other in named)]
    folders = tuple(path for path in leaves if path.endswith("/"))
    files = [*ROOT.glob("*.py"), *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))]
    modules = [str(file.relative_to(ROOT)) for file in files if not file.name.startswith("__")]
    assert not [path for path in modules if path not in named and not path.startswith(("tests/", *folders))]


@pytest.mark.parametrize("words", DIALECT)
def test_plain_english(words):
    pattern = re.compile(rf"\b{words}\b", re.IGNORECASE)
    folders = [ROOT / name for name in PACKAGES]
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.py"))]
    files += [path for folder in folders for path in folder.rglob("*.md")]
    found = [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert not found, f"'{words}' occurs in {', '.join(found)}"
