"""What torch.compile needs on a machine: its back end writes C++ on a CPU, and Triton builds its launcher with a C
compiler on a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from engine.errors import EngineError


class CompilerError(EngineError):
    """solver.compile on a machine without a compiler."""


def check_compiler(compiles: bool, device: torch.device) -> None:
    """Refuse solver.compile, before anything is built, where it would fail in the first step.

    Args:
        compiles: solver.compile.

    Raises:
        CompilerError: the machine lacks a compiler.
    """
    if not compiles:
        return
    missing = _missing_on_gpu() if device.type == "cuda" else _missing_on_cpu()
    if missing is not None:
        raise CompilerError(f"solver.compile needs {missing}, none is found: install one or set it to false")


def _missing_on_cpu() -> str | None:
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds to import

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError, RuntimeError):  # what CXX names may be no program
        named = [name for name in config.cpp.cxx if name and "CXX" in os.environ]
        return f"a C++ compiler ({f'CXX={named[0]}' if named else 'g++, or another that CXX names'})"
    return None


def _missing_on_gpu() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton (pip install triton)"
    named = os.environ.get("CC")
    if shutil.which(named.split()[0]) if named else (shutil.which("gcc") or shutil.which("clang")):
        return None
    return f"a C compiler ({f'CC={named}' if named else 'gcc, clang, or another that CC names'})"
