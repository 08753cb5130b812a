"""Exits with 1 and names what is missing where this interpreter does not have what requirements.txt asks for."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a new environment has pip's copy
    from pip._vendor.packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def missing(lines: list[str]) -> list[str]:
    """The requirements that are not met, as the lines write them, with the version that is installed if there is one."""
    found = []
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found.append(text)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{text} (installed: {installed})")
    return found


if __name__ == "__main__":
    if unmet := missing(REQUIREMENTS.read_text(encoding="utf-8").splitlines()):
        print(", ".join(unmet))
        sys.exit(1)
