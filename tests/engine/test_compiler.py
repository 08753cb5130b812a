"""solver.compile on a machine that lacks what torch.compile needs: one sentence before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._inductor import config

from engine.compiler import CompilerError, check_compiler
from tests.helpers.cli_harness import refusal

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def refused(device: torch.device) -> str:
    check_compiler(False, device)
    with pytest.raises(CompilerError) as caught:
        check_compiler(True, device)
    return str(caught.value)


def test_the_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with config.patch({"cpp.cxx": (None, "g++-absent")}):
        assert refused(CPU) == (
            "solver.compile needs a C++ compiler (g++, or another that CXX names), none is found: install one or set "
            "it to false"
        )
    monkeypatch.setenv("CXX", "icpx")
    with config.patch({"cpp.cxx": (None, "icpx")}):
        assert "a C++ compiler (CXX=icpx), none is found" in refused(CPU)
    assert "needs a C compiler (gcc, clang, or another that CC names), none" in refused(GPU)
    monkeypatch.setenv("CC", "icx -O2")
    assert "needs a C compiler (CC=icx -O2), none" in refused(GPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs Triton (pip install triton)" in refused(GPU)


def test_a_compiler_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    compiler = tmp_path / "mine"
    compiler.write_text("#!/bin/sh\necho 1.0\n")
    compiler.chmod(0o755)
    with config.patch({"cpp.cxx": (None, str(compiler))}):
        check_compiler(True, CPU)
    if torch.utils._triton.has_triton_package():
        monkeypatch.setenv("CC", str(compiler))
        check_compiler(True, GPU)


def test_training_and_testing_are_refused_before_they_begin(tiny: Path, trained: Path, tmp_path: Path):
    compiled = ("--config", tiny, "--set", "solver.compile=true")
    with config.patch({"cpp.cxx": (None, "absent-compiler")}):
        assert "solver.compile needs a C++" in refusal("train_vision.py", *compiled, "--output", tmp_path / "run")
        assert "solver.compile needs a C++" in refusal("test_vision.py", *compiled, "--weights", trained)
    assert not (tmp_path / "run").exists()
