"""Runs all fault tests, the random ones in several rounds, and prints what was tried and what survived.

python -m tests.helpers.fault_runs [--rounds 5] [--seed 0] [-- PYTEST ARGUMENTS]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import pytest


class Counts:
    """A pytest plugin that counts how often the fault of each test was tried and survived.

    These are the test's properties `tried` and `survived`; by default one a case, and all or none of it.
    """

    def __init__(self) -> None:
        self.title: dict[str, str] = {}
        self.tried, self.survived = Counter[str](), Counter[str]()
        self.skipped: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Collect the titles; a docstring in parentheses does not describe a fault."""
        for item in items:
            self.title[item.nodeid] = " ".join((item.function.__doc__ or item.name).split()).rstrip(".")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        title = self.title[report.nodeid]
        if title.startswith("("):
            return
        if report.skipped:
            self.skipped[title] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.when == "call" or report.failed:
            properties = dict(report.user_properties)
            tried = properties.get("tried", 1)
            self.tried[title] += tried
            self.survived[title] += properties.get("survived", tried if report.passed else 0)

    def table(self) -> str:
        """Markdown: one line a fault, in the order of the tests, and their sum."""
        rows = [f"| {title} | {count} | {self.survived[title]} |" for title, count in self.tried.items()]
        rows += [f"| {title} | - | {why} |" for title, why in self.skipped.items() if title not in self.tried]
        total = f"| all | {sum(self.tried.values())} | {sum(self.survived.values())} |"
        return "\n".join(["| fault | tried | survived |", "|---|---|---|", *rows, total])


def main(arguments: list[str]) -> int:
    """Run all fault tests and print the table; 0 if all were survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.fault_runs", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often the random faults are tried (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and positions (0)")
    parser.add_argument("words", nargs="*", metavar="PYTEST", help="after --: arguments for pytest, e.g. -k tmpfs")
    options = parser.parse_args(arguments)
    os.environ |= {"FAULT_ROUNDS": str(options.rounds), "FAULT_SEED": str(options.seed)}
    counts, tests = Counts(), sorted(Path(__file__).parents[1].glob("entry_points/test_faults*.py"))
    status = pytest.main(["-q", "-p", "no:cacheprovider", *map(str, tests), *options.words], plugins=[counts])
    print(f"\nSeed {options.seed}, {options.rounds} rounds.\n\n{counts.table()}")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
