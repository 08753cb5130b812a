"""What is known of a run at its start, and what of it a resumed run checks."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engine.record import source_revision


def test_revision_of_a_tree_clean_dirty_and_without_git(tmp_path: Path) -> None:
    assert source_revision(tmp_path) == {"revision": "unknown", "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    clean = source_revision(tmp_path)
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "new.py").write_text("")
    assert source_revision(tmp_path) == {**clean, "dirty": True}
    assert source_revision(tmp_path / "inner")["revision"] == "unknown"  # another tree's revision says nothing
