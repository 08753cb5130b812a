"""Downloaded archives -> folders: .zip, .tar(.gz, .bz2, .xz), .tgz, .rar, and Something-Something's cut tar pieces.

Each archive becomes a folder of its own, written beside under a hidden name and renamed when it is whole; archives found
inside are unpacked likewise and then removed. A rerun goes on: finished archives are left alone, files already out of an
interrupted zip or tar are not written again. Nothing is written outside the folder. rar needs one of EXTRACTORS.

    unpack(find_archives(Path("downloads")), Path("out/unpacked/videos"))
"""

from __future__ import annotations

import glob
import io
import logging
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.files import walk
from datasets.prepare.lists import PrepareError
from datasets.prepare.pieces import PieceStream
from datasets.prepare.space import require_space

ZIP, TAR, RAR = (".zip",), (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), (".rar",)
PIECE = re.compile(r"(?P<base>20bn-something-something-v[12])-(?P<number>\d\d)")
LATER_RAR = re.compile(r"\.part0*([2-9]|[1-9]\d+)\.rar$")  # further volumes, which the extractor finds by itself
EXTRACTORS = {  # command -> arguments for (archive, folder); tried in this order
    "unrar": lambda file, folder: ["x", "-o+", "-y", "-idq", "-p-", file, f"{folder}/"],
    "unar": lambda file, folder: ["-quiet", "-force-overwrite", "-no-directory", "-output-directory", folder, file],
    "bsdtar": lambda file, folder: ["-xf", file, "-C", folder],
    "7zz": lambda file, folder: ["x", "-y", "-bd", f"-o{folder}", file],
    "7z": lambda file, folder: ["x", "-y", "-bd", f"-o{folder}", file],
}
PACKAGES = "unrar, unar or libarchive-tools"  # not 7zip, which some systems ship without its rar part
DONE = ".unpacked"  # in the target folder: `size name` of each finished archive, one a line
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, RuntimeError, NotImplementedError)

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Archive:
    """One archive: its name relative to where it was found, without suffix, and its file, or its pieces in order."""

    name: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files)

    def unpacked_size(self) -> int:
        """Bytes of what is in it, or, where only unpacking tells, of the archive: videos hardly compress."""
        if self.files[0].name.lower().endswith(ZIP):
            with zipfile.ZipFile(self.files[0]) as archive:
                return sum(item.file_size for item in archive.infolist())
        return self.size

    def __str__(self) -> str:
        return str(self.files[0]) + (f" ... -{self.files[-1].name[-2:]}" if len(self.files) > 1 else "")


def unpack(archives: Sequence[Archive], target: Path, suffixes: Collection[str] | None = None) -> None:
    """Unpacks archives, and those inside them, to folders in `target`, unless an earlier run did.

    Args:
        suffixes: of the members that are wanted, in lower case; a rar is unpacked whole. None: all.

    Raises:
        PrepareError: an archive is broken, holds paths that lead out, there is no extractor for a rar, or no space.
        OSError: `target` cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for number, archive in enumerate(archives, 1):
        _unpack(archive, target, suffixes, f"{number} of {len(archives)}")
    while inner := find_archives(target):
        for archive in inner:
            _unpack(archive, target, suffixes, "found inside")
            for file in archive.files:
                file.unlink()


def find_archives(source: Path, skip: Path | None = None) -> list[Archive]:
    """The archives below a folder (or the one that `source` is); pieces of one tar count as one archive."""
    if source.is_file():
        return [Archive(_stem(source.name), (source,))] if _stem(source.name) != source.name else []
    archives: dict[str, Archive] = {}
    pieces: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in (folder / name for folder, names in walk(source, skip) for name in names):
        fit = PIECE.fullmatch(path.name)
        if fit:
            if other := pieces[fit["base"]].get(int(fit["number"])):
                raise PrepareError(f"{other} and {path} are the same piece; keep one")
            pieces[fit["base"]][int(fit["number"])] = path
        elif _stem(path.name) != path.name and not LATER_RAR.search(path.name.lower()):
            name = path.with_name(_stem(path.name)).relative_to(source).as_posix()
            if name in archives:
                raise PrepareError(f"{archives[name]} and {path} would be unpacked to the same folder; keep one")
            archives[name] = Archive(name, (path,))
    for base, numbered in pieces.items():
        absent = sorted(set(range(max(numbered) + 1)) - set(numbered))
        if absent:
            raise PrepareError(f"{source}: {base}-{absent[0]:02d} is missing, {base}-{max(numbered):02d} is there")
        archives[base] = Archive(base, tuple(numbered[number] for number in sorted(numbered)))
    return [archives[name] for name in sorted(archives)]


def _stem(name: str) -> str:
    """The name without an archive's suffix; unchanged where it has none."""
    for suffix in sorted((*ZIP, *TAR, *RAR), key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _unpack(archive: Archive, target: Path, suffixes: Collection[str] | None, which: str) -> None:
    """Unpacks one archive to `target / archive.name`, unless an earlier run did."""
    folder, done = target / archive.name, target / DONE
    record = f"{archive.size} {archive.name}"
    recorded = done.exists() and record in done.read_text(encoding="utf-8").splitlines()
    if folder.exists():
        if not recorded:
            raise PrepareError(f"{folder}: is there, but not what {archive} holds now; remove it")
        return
    logger.info("unpacking %s (%s)", archive, which)
    partial = _partial(archive, folder)
    try:
        rar = archive.files[0].name.lower().endswith(RAR)
        if rar or suffixes is None:
            require_space(target, archive.unpacked_size(), f"unpacking {archive}")
        if rar:
            shutil.rmtree(partial, ignore_errors=True)  # an extractor may leave a half-written file
            partial.mkdir(parents=True)
            _run_extractor(archive, partial)
        else:
            partial.mkdir(parents=True, exist_ok=True)
            members = _zip_members if archive.files[0].name.lower().endswith(ZIP) else _tar_members
            for name, size, content in members(archive):
                if suffixes is None or Path(name).suffix.lower() in suffixes:
                    _write(partial, name, size, content, archive)
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the archive's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        stays = f", what came out stays in {partial}" if any(path.is_file() for path in partial.rglob("*")) else ""
        raise PrepareError(f"{archive}: is broken or incomplete ({reason}); download it again{stays}") from error
    with done.open("a", encoding="utf-8") as file:
        file.write(f"{record}\n")
    os.replace(partial, folder)


def _partial(archive: Archive, folder: Path) -> Path:
    """The folder in which the archive as it is now is being unpacked; removes those of its former downloads."""
    changed = max(file.stat().st_mtime_ns for file in archive.files)
    partial = folder.with_name(f".{folder.name}.{archive.size}.{changed}.partial")
    for other in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        if other != partial:
            shutil.rmtree(other)
    return partial


def _write(folder: Path, name: str, size: int, content: BinaryIO, archive: Archive) -> None:
    """Writes one file whole or not at all; one of the right size from an interrupted run stays."""
    inside = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(inside) or inside.split("/")[0] == "..":
        raise PrepareError(f"{archive}: holds {name!r}, which leads out of the folder; it is not unpacked")
    path = folder / inside
    if path.is_file() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
    os.replace(partial, path)


def _zip_members(archive: Archive) -> Iterator[tuple[str, int, BinaryIO]]:
    """(name, size, content) of the files; reading to the end of one checks its sum."""
    with zipfile.ZipFile(archive.files[0]) as file:
        for item in file.infolist():
            if not item.is_dir():
                with file.open(item) as content:
                    yield item.filename, item.file_size, content


def _tar_members(archive: Archive) -> Iterator[tuple[str, int, BinaryIO]]:
    """(name, size, content) of the regular files; links and devices are left out and counted in a warning."""
    left_out = 0
    with io.BufferedReader(PieceStream(archive.files), 1 << 20) as stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            if member.isreg():
                yield member.name, member.size, tar.extractfile(member)
            elif not member.isdir():
                left_out += 1
        # tarfile takes a cut or damaged header for the end; the true end is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError("its end is missing")
        while tar.fileobj.read(1 << 20):  # to the end, where compressed files keep their check sum
            continue
    if left_out:
        logger.warning("%s: %d links or devices are left out", archive, left_out)


def _run_extractor(archive: Archive, folder: Path) -> None:
    """Unpacks a rar with the first installed extractor that can."""
    installed = [name for name in EXTRACTORS if shutil.which(name)]
    if not installed:
        raise PrepareError(f"{archive}: no program that unpacks rar is installed; install {PACKAGES}")
    for name in installed:
        command = [name, *EXTRACTORS[name](str(archive.files[0].absolute()), str(folder.absolute()))]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if result.returncode == 0 and any(folder.iterdir()):
            return
        lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    raise PrepareError(
        f"{archive}: {name} cannot unpack it ({lines[0] if lines else f'exit code {result.returncode}'}); download it "
        f"again, or install another of {PACKAGES}"
    )
