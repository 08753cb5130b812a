"""Unpacking: every kind of archive, damaged ones, resuming, and nothing outside the folder."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from datasets.prepare import archives
from datasets.prepare.archives import find_archives, unpack
from datasets.prepare.plan import PrepareError
from tests.helpers.video_files import write_rar

FILES = {"UCF-101/A/a.avi": b"a" * 3000, "UCF-101/B/b.avi": bytes(range(256)) * 2000, "UCF-101/B/empty.avi": b""}


def write_tar(path: Path, files: dict[str, bytes] = FILES, mode: str = "w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes] = FILES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def contents(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes of the files that are not hidden."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def run(source: Path, out: Path) -> Path:
    unpack(find_archives(source), out / "videos")
    return out / "videos"


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("u.zip", write_zip),
        ("u.tar", lambda path: write_tar(path, mode="w")),
        ("u.tar.gz", write_tar),
        ("U.TGZ", write_tar),
        ("u.tar.xz", lambda path: write_tar(path, mode="w:xz")),
    ],
)
@pytest.mark.parametrize("give_file", [False, True])
def test_kinds(tmp_path, name, write, give_file):
    archive = write(tmp_path / "in" / name)
    root = run(archive if give_file else archive.parent, tmp_path / "out")
    assert contents(root / name[0]) == FILES
    assert not list(root.rglob("*.partial"))


def test_only_some_members(tmp_path):
    write_zip(tmp_path / "in" / "u.zip", {"a/x.TXT": b"x", "a/y.avi": b"y", "z.json": b"z"})
    unpack(find_archives(tmp_path / "in"), tmp_path / "out", {".txt", ".json"})
    assert contents(tmp_path / "out") == {"u/a/x.TXT": b"x", "u/z.json": b"z"}


@pytest.mark.parametrize("zipped", [False, True])
def test_something_something_pieces(tmp_path, zipped):
    whole = write_tar(tmp_path / "whole.tgz").read_bytes()
    step = len(whole) // 4 + 1
    pieces = {f"20bn-something-something-v2-{n:02d}": whole[n * step : (n + 1) * step] for n in range(4)}
    (tmp_path / "in").mkdir()
    for name, data in pieces.items():
        if zipped:
            write_zip(tmp_path / "in" / f"{name}.zip", {name: data})
        else:
            (tmp_path / "in" / name).write_bytes(data)
    root = run(tmp_path / "in", tmp_path / "out")
    assert contents(root / "20bn-something-something-v2") == FILES
    assert set(contents(root)) == {f"20bn-something-something-v2/{name}" for name in FILES}  # inner pieces are gone
    assert run(tmp_path / "in", tmp_path / "out") == root


def test_a_missing_piece(tmp_path):
    for number in (0, 2):
        (tmp_path / f"20bn-something-something-v2-{number:02d}").write_bytes(b"x")
    with pytest.raises(PrepareError, match="v2-01 is missing"):
        find_archives(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.4, 0.9, 0.999])
@pytest.mark.parametrize("mode", ["w", "w:gz", "zip"])
def test_truncated(tmp_path, mode, share):
    path = tmp_path / "in" / "u.arc"
    path = write_zip(path.with_suffix(".zip")) if mode == "zip" else write_tar(path.with_suffix(".tar"), mode=mode)
    if mode == "w":
        share *= 0.98  # a tar ends in 10 kB of zeros, which nobody misses
    with pytest.raises(
        PrepareError, match=r"u\.(zip|tar): is damaged or incomplete \(.+\); download it again"
    ) as error:
        run(cut(path, share).parent, tmp_path / "out")
    came_out = any(file.is_file() for file in (tmp_path / "out").rglob("*.avi"))
    assert ("the files before the damage are in" in str(error.value)) >= came_out
    assert not (tmp_path / "out" / "videos" / "u").exists()


def test_a_tar_cut_between_two_files_is_damaged(tmp_path):
    path = write_tar(tmp_path / "in" / "u.tar", mode="w")
    path.write_bytes(path.read_bytes()[: 512 + 3072])  # the first file with its padding
    with pytest.raises(PrepareError, match="its end is missing"):
        run(path, tmp_path / "out")


def test_damaged_inside(tmp_path):
    path = write_zip(tmp_path / "in" / "u.zip", {"a.avi": b"a" * 10, "b.avi": bytes(range(256)) * 40})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    for _ in range(2):  # a file with a wrong checksum is not kept for the next run
        with pytest.raises(PrepareError, match="is damaged"):
            run(path, tmp_path / "out")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_interrupted_archive_resumes_and_another_download_starts_again(tmp_path, monkeypatch, write):
    path = write(tmp_path / "in" / ("u.zip" if write is write_zip else "u.tar.gz"))
    complete = path.read_bytes()
    extract, written = archives._extract, []

    def stop_in_the_second(extract_member, archive, name, size, folder):
        if len(written) == 1:
            half = folder / archives.UNFINISHED / name
            half.parent.mkdir(parents=True)
            half.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(name)
        extract(extract_member, archive, name, size, folder)

    monkeypatch.setattr(archives, "_extract", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out")
    (unfinished,) = (tmp_path / "out" / "videos").glob(".u.*.partial")
    first = unfinished / "UCF-101/A/a.avi"
    first.write_bytes(b"A" * 3000)  # to see whether it is written again
    monkeypatch.setattr(archives, "_extract", extract)
    assert contents(run(path, tmp_path / "out") / "u") == {**FILES, "UCF-101/A/a.avi": b"A" * 3000}

    path.write_bytes(complete[:-20])
    with pytest.raises(PrepareError, match="exists, but does not hold what .* holds now"):
        run(path, tmp_path / "out")
    with pytest.raises(PrepareError, match="damaged"):
        run(path, tmp_path / "out2")
    path.write_bytes(complete)
    assert contents(run(path, tmp_path / "out2") / "u") == FILES


@pytest.mark.parametrize("name", ["../out.avi", "/tmp/out.avi", "a/../../out.avi", "..\\out.avi"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_nothing_is_written_outside(tmp_path, name, write):
    path = write(tmp_path / "in" / ("u.zip" if write is write_zip else "u.tgz"), {name: b"x"})
    with pytest.raises(PrepareError, match="leads out of the folder"):
        run(path, tmp_path / "out")
    assert not list(tmp_path.rglob("out.avi"))


def test_a_python_without_safe_extraction_of_tars(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(PrepareError, match="u.tgz: this Python cannot unpack a tar safely; use 3.10.12"):
        run(write_tar(tmp_path / "u.tgz"), tmp_path / "out")


def test_links_in_a_tar_are_skipped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "u.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.avi")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    root = run(path, tmp_path / "out")
    assert not contents(root) and "1 links or devices are skipped" in caplog.text


def test_rar_without_an_extractor(tmp_path, monkeypatch):
    path = write_rar(tmp_path / "in" / "UCF101.rar", FILES)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError) as error:
        run(path.parent, tmp_path / "out")
    sentence = str(error.value)
    assert str(path) in sentence and "install unrar, unar or libarchive-tools" in sentence and "\n" not in sentence


def test_rar_of_rars_by_an_extractor(tmp_path, monkeypatch):
    """HMDB51's layout, and a stand-in for bsdtar, which reads any archive: tar."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(archives, "EXTRACTORS", {"bsdtar": archives.EXTRACTORS["bsdtar"]})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bsdtar").write_text('#!/bin/sh\nexec tar "$@"\n')
    (tmp_path / "bin" / "bsdtar").chmod(0o755)
    inner = {f"{c}.rar": write_tar(tmp_path / c, {f"{c}/1.avi": c.encode()}, "w").read_bytes() for c in ("run", "wave")}
    path = write_tar(tmp_path / "in" / "hmdb51_org.rar", inner, "w")
    root = run(path.parent, tmp_path / "out")
    assert contents(root) == {f"hmdb51_org/{c}/{c}/1.avi": c.encode() for c in ("run", "wave")}
    path.write_bytes(b"not an archive")
    with pytest.raises(PrepareError, match=r"hmdb51_org.rar: bsdtar cannot unpack it \(.+\); download it again"):
        run(path.parent, tmp_path / "out2")


def test_the_reason_is_the_extractors_first_complaint(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(archives, "EXTRACTORS", {"bsdtar": archives.EXTRACTORS["bsdtar"]})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bsdtar").write_text(
        "#!/bin/sh\necho x a.avi\necho 'Truncated RAR' >&2\necho 'Error exit' >&2\nexit 1\n"
    )
    (tmp_path / "bin" / "bsdtar").chmod(0o755)
    path = write_rar(tmp_path / "in" / "u.rar", FILES)
    with pytest.raises(PrepareError, match=r"bsdtar cannot unpack it \(Truncated RAR\)"):
        run(path, tmp_path / "out")


if any(map(shutil.which, ("unrar", "unar", "bsdtar"))):

    def test_rar_by_a_real_extractor(tmp_path):
        path = write_rar(tmp_path / "in" / "u.rar", FILES)
        assert contents(run(path, tmp_path / "out") / "u") == FILES
        write_rar(path, FILES)
        with pytest.raises(PrepareError, match="cannot unpack it"):
            run(cut(path, 0.5), tmp_path / "out2")


def test_too_little_space(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "in" / "u.zip", {"a.avi": bytes(10)})
    monkeypatch.setattr(archives.Archive, "unpacked_size", lambda self: 10**18)
    with pytest.raises(PrepareError, match=r"unpacking .*u\.zip needs about 1000000\.0 TB, the disk has .* free"):
        run(path, tmp_path / "out")


def test_names_that_would_share_a_folder(tmp_path):
    write_zip(tmp_path / "u.zip")
    write_tar(tmp_path / "u.tgz")
    with pytest.raises(PrepareError, match="unpacked to the same folder"):
        find_archives(tmp_path)


def test_a_folder_with_the_name_of_an_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "in" / "outer.zip", {"u/keep.avi": b"k", "u.zip": b"", "x.avi": b"x"})
    inner = write_zip(tmp_path / "u.zip").read_bytes()
    write_zip(path, {"u/keep.avi": b"k", "u.zip": inner})
    with pytest.raises(PrepareError, match="remove it"):
        run(path, tmp_path / "out")
    assert (tmp_path / "out/videos/outer/u.zip").exists()
