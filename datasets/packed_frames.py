"""Packed frames: one stored (uncompressed) zip a video, in place of a folder with one file a frame.

    python -m datasets.packed_frames FRAMES OUT [--image-tmpl TEMPLATE] [--index-base 0] [--jobs N]

packs every frame folder below FRAMES: the frames of FRAMES/a/video go to OUT/a/video.zip, byte for byte, under the
names that they have in the folder. OUT may be FRAMES: a zip then stands beside its folder. Loaders read the zip where
there is one, else the folder. A zip is complete or absent: it gets its name when it is on the disk. The command deletes
nothing, leaves out what is packed already, and writes nothing while something is wrong with any folder.
"""

from __future__ import annotations

import argparse
import logging
import lzma
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.console import Parser, log_to_console
from common.files import try_lock, write_atomic
from common.tables import format_bytes
from common.workers import Workers, num_cores, progress
from datasets.frame_names import USUAL, FrameNames
from datasets.limits import SizeError, check_file_size

SUFFIX = ".zip"
_KILLED = "the process at work on it was killed; run the command again"
HEADER_BYTES = 200  # of a frame in a zip, at most, for names of usual length
SHOWN_PROBLEMS = 20
# What zipfile raises of damaged files.
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)

logger = logging.getLogger("td4v")


class PackError(RuntimeError):
    """Frames that cannot be packed or read; one sentence that names the file or folder."""


class PackedVideo:
    """The opened zip of one video. It belongs to the process that opened it, and closes when nobody holds it.

    Raises:
        PackError: the file is not there or is no complete zip.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise PackError(f"{path}: cannot be read ({error.strerror})") from None
        except _DAMAGE as error:
            raise PackError(f"{path}: is damaged or no zip ({error}); delete it and pack its frames again") from None

    def sizes(self) -> dict[str, int]:
        """Bytes of each frame by its name."""
        return {member.filename: member.file_size for member in self._zip.infolist()}

    def __len__(self) -> int:
        return len(self._zip.infolist())

    def __contains__(self, name: str) -> bool:
        return name in self._zip.NameToInfo

    def read(self, name: str) -> bytes:
        """The file of the frame of this name, compared with its checksum.

        Raises:
            PackError: the frame is not there, cannot be read or is damaged.
        """
        try:
            check_file_size(f"{self.path}: {name}", self._zip.getinfo(name).file_size)
            return self._zip.read(name)
        except KeyError:
            raise PackError(f"{self.path}: {name} is missing; the zip holds {len(self)} frames") from None
        except SizeError as error:
            raise PackError(str(error)) from None
        except OSError as error:
            raise PackError(f"{self.path}: {name} cannot be read ({error.strerror or error})") from None
        except _DAMAGE as error:
            raise PackError(f"{self.path}: {name} is damaged ({error}); pack its frames again") from None


def packed_path(folder: str) -> str:
    """Where the zip of the video is whose frame folder is, or would be, `folder`."""
    return folder.rstrip("/") + SUFFIX


def write_packed(path: Path, frames: Iterable[tuple[str, bytes]]) -> None:
    """Write the frames of one video, (name, file) in order, to a zip that is complete or absent.

    Equal frames give equal zips. Raises OSError, and what `frames` raises; `path` is then as it was.
    """

    def fill(file) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in frames:
                member = zipfile.ZipInfo(name)  # of 1980, not of today
                member.external_attr = 0o644 << 16
                archive.writestr(member, data)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, fill)


def pack(frames: Path, out: Path, names: FrameNames = USUAL, jobs: int = 1) -> None:
    """Pack every frame folder below `frames` that is not packed in `out` yet.

    Raises:
        PackError: a folder is empty, has a gap or another file than `names` has; `out` lies inside `frames`,
            holds another zip of a video, is in use or too full; a zip cannot be written. Finished zips are kept.
    """
    _check_template(names.image_tmpl)
    if not frames.is_dir():
        raise PackError(f"{frames}: there is no such folder")
    if frames.resolve() in out.resolve().parents:
        raise PackError(f"{out}: lies inside the frames, {frames}; choose another folder, or {frames} itself")
    videos = [(folder, out / f"{folder.relative_to(frames)}{SUFFIX}") for folder in _video_folders(frames)]
    if not videos:
        raise PackError(f"{frames}: holds no frame folders")
    with Workers(jobs) as workers:
        scans = workers.run(partial(_scan, names), videos)
        found = dict(progress(scans, len(videos), "looking at the frames"))
        _refuse([scan or _KILLED for scan in found.values() if not isinstance(scan, _Scan)])
        todo = [video for video in videos if not found[video].packed]
        logger.info("%s: %d of %d videos are packed already", out, len(videos) - len(todo), len(videos))
        _check_space(out, sum(found[video].size for video in todo))
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "w") as lock:
            if not try_lock(lock):
                raise PackError(f"{out}: another process is packing frames there")
            for (_, target), error in progress(workers.run(_pack_folder, todo), len(todo), "packing"):
                if error != "":
                    raise PackError(error or f"{target}: {_KILLED}")


class _Scan(NamedTuple):
    size: int  # bytes of the zip, at most
    packed: bool


def _video_folders(frames: Path) -> Iterator[Path]:
    """The folders below `frames` without folders in them. Raises PackError, or OSError where one cannot be listed."""
    for name, folders, _ in os.walk(frames, followlinks=True, onerror=_fail):
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        folder = Path(name)
        for link in (folder / inner for inner in folders if os.path.islink(os.path.join(name, inner))):
            if folder.resolve().is_relative_to(link.resolve()):
                raise PackError(f"{link}: is a link to a folder that holds it")
        if not folders and folder != frames:
            yield folder
        elif files := _frame_files(folder):
            raise PackError(f"{folder / min(files)}: lies outside the frame folders")


def _fail(error: OSError) -> None:
    raise error


def _frame_files(folder: Path) -> dict[str, int]:
    """Bytes of each file by its name, without hidden files and zips."""
    with os.scandir(folder) as entries:
        wanted = [entry for entry in entries if not entry.name.startswith(".") and not entry.name.endswith(SUFFIX)]
        return {entry.name: entry.stat().st_size for entry in wanted if entry.is_file()}


def _scan(names: FrameNames, video: tuple[Path, Path]) -> _Scan | str:
    """Look at a frame folder and at its zip, if there is one; a string says what is wrong."""
    folder, target = video
    try:
        sizes = _frame_files(folder)
        expected = [names.name(index) for index in range(len(sizes))]
        if not sizes:
            return f"{folder}: holds no frames"
        if other := sorted(sizes.keys() - expected):
            gap = next(name for name in expected if name not in sizes)
            rule = f"frames are named {names.image_tmpl!r} from {names.index_base} on"
            advice = names.advice(sizes, "--image-tmpl ", "--index-base ")
            return f"{folder}: {gap} is missing, but {other[0]} is there; {rule}{advice}"
        if target.exists() and PackedVideo(target).sizes() != sizes:
            return f"{target}: holds other frames than {folder}; delete it to pack them again"
    except (OSError, PackError) as error:
        return str(error)
    return _Scan(sum(sizes.values()) + HEADER_BYTES * len(sizes), target.exists())


def _pack_folder(video: tuple[Path, Path]) -> str:
    """Pack one folder; a string that is not empty says what is wrong."""
    folder, target = video
    try:
        write_packed(target, ((name, (folder / name).read_bytes()) for name in sorted(_frame_files(folder))))
    except OSError as error:
        return f"{target}: cannot be written ({error}); finished zips are kept, the same command continues"
    return ""


def _check_template(image_tmpl: str) -> None:
    try:
        names = {image_tmpl.format(number) for number in (1, 2)}
    except (IndexError, KeyError, ValueError) as error:
        raise PackError(f"--image-tmpl {image_tmpl!r}: does not format a frame number ({error})") from None
    if len(names) < 2 or "/" in image_tmpl or image_tmpl.startswith("."):
        raise PackError(
            f"--image-tmpl {image_tmpl!r}: must be a file name with one frame number, e.g. {USUAL.image_tmpl!r}"
        )


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(next(folder for folder in (out, *out.resolve().parents) if folder.exists())).free
    if needed > free:
        raise PackError(f"{out}: needs {format_bytes(needed)}, but the disk has {format_bytes(free)} free")


def _refuse(problems: Sequence[str]) -> None:
    for problem in problems[:SHOWN_PROBLEMS] if len(problems) > 1 else ():
        logger.error("%s", problem)
    if problems:
        raise PackError(problems[0] if len(problems) == 1 else f"{len(problems)} videos cannot be packed, see above")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 1 with a sentence on stderr, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m datasets.packed_frames",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("frames", type=Path, metavar="FRAMES", help="the folder of the frame folders")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the zips go")
    parser.add_argument("--image-tmpl", default=USUAL.image_tmpl, help="names of the frames (default: %(default)s)")
    parser.add_argument(
        "--index-base", type=int, choices=(0, 1), default=1, help="number of the first frame (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=num_cores(), help="processes (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error("--jobs must be 1 or more")
    log_to_console()
    try:
        names = FrameNames(arguments.image_tmpl, arguments.index_base)
        pack(arguments.frames, arguments.out, names, arguments.jobs)
    except (PackError, OSError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; finished zips are kept, the same command continues")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
