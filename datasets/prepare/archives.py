"""Unpacks downloaded archives: .zip, .tar(.gz, .bz2, .xz), .tgz, .rar, and the tar that Something-Something is cut from.

    unpack(find_archives(Path("downloads")), Path("out/unpacked/videos"))

Each archive becomes one folder, which gets its name when it is complete. Archives inside archives are unpacked too and
then removed. A rerun skips finished archives, and finished files of an interrupted zip or tar.
"""

from __future__ import annotations

import glob
import gzip
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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.files import walk
from datasets.prepare.output_dir import require_space
from datasets.prepare.plan import PrepareError

ZIP, TAR, RAR = (".zip",), (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), (".rar",)
SUFFIXES = sorted((*ZIP, *TAR, *RAR), key=len, reverse=True)
PIECE = re.compile(r"(?P<base>20bn-something-something-v[12])-(?P<number>\d\d)")  # of one .tar.gz
LATER_RAR = re.compile(r"\.part0*([2-9]|[1-9]\d+)\.rar$")  # further volumes, which the extractor finds by itself
EXTRACTORS = {  # command -> arguments for (archive, folder); tried in this order
    "unrar": lambda file, folder: ["x", "-o+", "-y", "-idq", "-p-", file, f"{folder}/"],
    "unar": lambda file, folder: ["-quiet", "-force-overwrite", "-no-directory", "-output-directory", folder, file],
    "bsdtar": lambda file, folder: ["-xf", file, "-C", folder],
    "7zz": lambda file, folder: ["x", "-y", "-bd", f"-o{folder}", file],
    "7z": lambda file, folder: ["x", "-y", "-bd", f"-o{folder}", file],
}
EXTRACTOR_PACKAGES = "unrar, unar or libarchive-tools"  # not 7zip, which some systems ship without its rar part
DONE = ".unpacked"  # file in the target folder: `size name` of each finished archive, one a line
UNFINISHED = ".unfinished"  # folder of the file that is being unpacked
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,
    NotImplementedError,
)

logger = logging.getLogger("td4v")


@dataclass(frozen=True)
class Archive:
    """One archive."""

    name: str  # path below the folder where it was found, without suffix
    files: tuple[Path, ...]  # one, or the pieces in order

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files)

    def is_kind(self, suffixes: tuple[str, ...]) -> bool:
        return self.files[0].name.lower().endswith(suffixes)

    def unpacked_size(self) -> int:
        """Bytes of the content of a zip; otherwise those of the archive, as videos hardly compress."""
        if self.is_kind(ZIP):
            with zipfile.ZipFile(self.files[0]) as archive:
                return sum(member.file_size for member in archive.infolist())
        return self.size

    def __str__(self) -> str:
        return str(self.files[0]) + (f" ... -{self.files[-1].name[-2:]}" if len(self.files) > 1 else "")


def unpack(archives: Sequence[Archive], target: Path, suffixes: Collection[str] | None = None) -> None:
    """Unpack archives, and those inside them, to folders in `target`.

    Args:
        suffixes: of the files to unpack, in lower case; None: all. A rar is always unpacked completely.

    Raises:
        PrepareError: an archive is damaged or unsafe, no rar extractor is installed, or there is too little space.
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
    """The archives in the folder `source`, or `source` itself; the pieces of a tar are one archive."""
    if source.is_file():
        return [Archive(_stem(source.name), (source,))] if _stem(source.name) != source.name else []
    archives: dict[str, Archive] = {}
    pieces: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in (folder / name for folder, names in walk(source, skip) for name in names):
        piece = PIECE.fullmatch(path.name)
        if piece:
            other = pieces[piece["base"]].setdefault(int(piece["number"]), path)
            if other != path:
                raise PrepareError(f"{other} and {path} are the same piece; keep one")
        elif _stem(path.name) != path.name and not LATER_RAR.search(path.name.lower()):
            name = path.with_name(_stem(path.name)).relative_to(source).as_posix()
            if name in archives:
                raise PrepareError(f"{archives[name]} and {path} would be unpacked to the same folder; keep one")
            archives[name] = Archive(name, (path,))
    for base, numbered in pieces.items():
        missing = sorted(set(range(max(numbered) + 1)) - set(numbered))
        if missing:
            raise PrepareError(f"{source}: {base}-{missing[0]:02d} is missing, {base}-{max(numbered):02d} is there")
        archives[base] = Archive(base, tuple(numbered[number] for number in sorted(numbered)))
    return [archives[name] for name in sorted(archives)]


def _stem(name: str) -> str:
    """The name without an archive's suffix; unchanged if it has none."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _unpack(archive: Archive, target: Path, suffixes: Collection[str] | None, which: str) -> None:
    """Unpack one archive to `target / archive.name`, unless an earlier run did."""
    folder, done = target / archive.name, target / DONE
    record = f"{archive.size} {archive.name}"
    if folder.exists():
        if not done.exists() or record not in done.read_text(encoding="utf-8").splitlines():
            raise PrepareError(f"{folder}: exists, but does not hold what {archive} holds now; remove it")
        return
    logger.info("unpacking %s (%s)", archive, which)
    unfinished = _unfinished_folder(archive, folder)
    try:
        if archive.is_kind(RAR) or suffixes is None:
            require_space(target, archive.unpacked_size(), f"unpacking {archive}")
        if archive.is_kind(RAR):
            shutil.rmtree(unfinished, ignore_errors=True)  # an extractor may leave a half-written file
        unfinished.mkdir(parents=True, exist_ok=True)
        if archive.is_kind(RAR):
            _unpack_rar(archive, unfinished)
        elif archive.is_kind(ZIP):
            _unpack_zip(archive, unfinished, suffixes)
        else:
            _unpack_tar(archive, unfinished, suffixes)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the archive's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shutil.rmtree(unfinished / UNFINISHED, ignore_errors=True)
        kept = any(path.is_file() for path in unfinished.rglob("*"))
        kept = f"; the files before the damage are in {unfinished}" if kept else ""
        raise PrepareError(f"{archive}: is damaged or incomplete ({reason}); download it again{kept}") from error
    shutil.rmtree(unfinished / UNFINISHED, ignore_errors=True)
    with done.open("a", encoding="utf-8") as file:
        file.write(f"{record}\n")
    os.replace(unfinished, folder)


def _unfinished_folder(archive: Archive, folder: Path) -> Path:
    """The folder that becomes `folder`, named after the download; those of previous downloads are removed."""
    changed = max(file.stat().st_mtime_ns for file in archive.files)
    unfinished = folder.with_name(f".{folder.name}.{archive.size}.{changed}.partial")
    for other in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        if other != unfinished:
            shutil.rmtree(other)
    return unfinished


def _unpack_zip(archive: Archive, folder: Path, suffixes: Collection[str] | None) -> None:
    with zipfile.ZipFile(archive.files[0]) as file:
        for member in file.infolist():
            if not member.is_dir() and _is_selected(member.filename, suffixes):
                _extract(partial(file.extract, member), archive, member.filename, member.file_size, folder)


def _unpack_tar(archive: Archive, folder: Path, suffixes: Collection[str] | None) -> None:
    """Unpack the regular files; links and devices are skipped with a warning."""
    if not hasattr(tarfile, "data_filter"):
        raise PrepareError(f"{archive}: this Python cannot unpack a tar safely; use 3.10.12, 3.11.4, 3.12 or newer")
    skipped = 0
    with _open_tar(archive) as tar:
        for member in tar:
            if member.isreg() and _is_selected(member.name, suffixes):
                _extract(partial(tar.extract, member, filter="data"), archive, member.name, member.size, folder)
            skipped += not (member.isreg() or member.isdir())
        _check_end(tar)
    if skipped:
        logger.warning("%s: %d links or devices are skipped", archive, skipped)


def _open_tar(archive: Archive) -> tarfile.TarFile:
    if len(archive.files) == 1:
        return tarfile.open(archive.files[0])
    pieces = gzip.GzipFile(fileobj=io.BufferedReader(_Pieces(archive.files), 1 << 20))
    return tarfile.open(fileobj=pieces, mode="r:")


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises TarError or EOFError if the tar is cut. tarfile takes a cut or damaged header for the end of the archive."""
    if isinstance(tar.fileobj, io.BufferedReader):  # not compressed, so without a checksum; zeros mark the end
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError("its end is missing")
    while tar.fileobj.read(1 << 20):  # to the end, where compressed files hold their checksum
        continue


class _Pieces(io.RawIOBase):
    """Files cut from one file, as a stream from the first to the last."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [path.open("rb", buffering=0) for path in paths]
        self._current = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while self._current < len(self._files):
            if count := self._files[self._current].readinto(buffer):
                return count
            self._current += 1
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def _is_selected(name: str, suffixes: Collection[str] | None) -> bool:
    return suffixes is None or Path(name).suffix.lower() in suffixes


def _extract(extract: Callable[..., object], archive: Archive, name: str, size: int, folder: Path) -> None:
    """Write one file completely or not at all; skip it if an interrupted run has written it.

    zipfile and tarfile rename some unsafe names silently, so those are refused first.
    """
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0]:
        raise PrepareError(f"{archive}: holds {name!r}, which leads out of the folder; it is not unpacked")
    path = folder / name
    if path.is_file() and path.stat().st_size == size:
        return
    extract(path=folder / UNFINISHED)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder / UNFINISHED / name, path)


def _unpack_rar(archive: Archive, folder: Path) -> None:
    """Run the installed extractors until one succeeds."""
    installed = [name for name in EXTRACTORS if shutil.which(name)]
    if not installed:
        raise PrepareError(f"{archive}: no program that unpacks rar is installed; install {EXTRACTOR_PACKAGES}")
    for name in installed:
        command = [name, *EXTRACTORS[name](str(archive.files[0].absolute()), str(folder.absolute()))]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if result.returncode == 0 and any(folder.iterdir()):
            return
        lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    raise PrepareError(
        f"{archive}: {name} cannot unpack it ({lines[0] if lines else f'exit code {result.returncode}'}); download it "
        f"again, or install another of {EXTRACTOR_PACKAGES}"
    )
