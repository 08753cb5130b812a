"""Unusual videos: frame k is the k-th that decodes, upright and whole, with both decoders, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from datasets import limits
from datasets.decoders import DecodeError, open_video
from datasets.prepare.decode import probe
from tests.datasets.test_decoders import DECODERS, check_any_subset, needs_decord, sentence, shown
from tests.helpers.video_files import cut_off, write_video

B_FRAMES = {"x264-params": "bframes=3:keyint=15"}


def copied(
    source: Path,
    target: Path,
    change: Callable[[int, av.Packet], None] = lambda number, packet: None,
    matrix: list[int] | None = None,
) -> Path:
    """Copy the packets of a video, each changed by `change(number, packet)`, and maybe give it a display matrix."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            change(number, packet)
            packet.stream = stream
            new.mux(packet)
    return target


def stamp_as_stored(number: int, packet: av.Packet) -> None:
    packet.pts = packet.dts = number
    packet.time_base, packet.duration = Fraction(1, 25), 1


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", B_FRAMES),
        ("libx265", {"x265-params": "log-level=none:bframes=3:keyint=15"}),
        ("mpeg4", {"bf": 2, "g": 12}),
    ],
)
def test_time_stamps_in_the_order_of_storage(codec, options, container, decoder, tmp_path):
    whole = write_video(tmp_path / "whole.mkv", codec=codec, **options)
    path = copied(whole, tmp_path / f"copied.{container}", stamp_as_stored)
    assert shown(check_any_subset(path, decoder, rounds=1), 40) == list(range(40))
    for index in range(0, 40, 3):
        assert shown(open_video(str(path), decoder).read(np.array([index])), 40) == [index]


TURNS = {  # the matrix's a, b, c, d: what is shown of a picture
    (1, 0, 0, 1): lambda pixels: pixels,
    (0, 1, -1, 0): lambda pixels: np.rot90(pixels, -1),
    (-1, 0, 0, -1): lambda pixels: np.rot90(pixels, 2),
    (0, -1, 1, 0): lambda pixels: np.rot90(pixels, 1),
    (-1, 0, 0, 1): lambda pixels: pixels[:, ::-1],
    (1, 0, 0, -1): lambda pixels: pixels[::-1],
    (0, 1, 1, 0): lambda pixels: pixels.swapaxes(0, 1),
    (0, -1, -1, 0): lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
}


def turned(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """The video plain.mp4 with a display matrix; x264 does not encode the same twice."""
    plain = write_video(path.with_name("plain.mp4"), frames=6, **B_FRAMES)
    return copied(plain, path, matrix=[int(value * 2**16) for value in (a, b, 0, c, d, 0, 0, 0, 2**14)])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("axes", TURNS)
def test_a_turned_or_mirrored_video_is_shown_upright(axes, decoder, tmp_path):
    path = turned(tmp_path / "turned.mp4", *axes)
    if decoder == "decord" and axes not in list(TURNS)[:4]:
        assert "does not show this file's rotation or mirroring" in sentence(path, decoder)
        return
    plain = np.stack(list(open_video(str(tmp_path / "plain.mp4"), decoder).frames()))
    expected = np.stack([TURNS[axes](frame) for frame in plain])
    assert (check_any_subset(path, decoder, rounds=1) == expected).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_turned_matroska_video(decoder, tmp_path):
    path = turned(tmp_path / "turned.mkv", 0, 1, -1, 0)
    if decoder == "decord":
        assert "use data.decoder: pyav" in sentence(path, decoder)
    else:
        assert open_video(str(path)).read(np.array([0])).shape == (1, 64, 48, 3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("axes", [(0.8, 0.6, -0.6, 0.8), (1, 0, 0.5, 1)])
def test_a_skewed_video_is_refused(axes, decoder, tmp_path):
    assert "rotation" in (message := sentence(turned(tmp_path / "skewed.mp4", *axes), decoder)) or "skewed" in message


def joined(path: Path, sources: list[tuple[Path, Disposition]]) -> Path:
    """One file with the video streams of several, in order, as they are."""
    inputs = [av.open(str(source)) for source, _ in sources]
    with av.open(str(path), "w") as target:
        streams = [target.add_stream_from_template(file.streams.video[0]) for file in inputs]
        for stream, (_, disposition) in zip(streams, sources, strict=True):
            stream.disposition = disposition
        for stream, file in zip(streams, inputs, strict=True):
            for packet in file.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    return path


@pytest.fixture
def picture_file(tmp_path):
    """A picture larger than the videos."""
    return write_video(tmp_path / "picture.mov", codec="mjpeg", frames=1, size=(96, 128), pix_fmt="yuvj420p")


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cover_is_no_video(decoder, picture_file, tmp_path):
    video = write_video(tmp_path / "some.mp4", **B_FRAMES)
    path = joined(tmp_path / "cover.mp4", [(picture_file, Disposition.attached_pic), (video, Disposition.default)])
    assert shown(check_any_subset(path, decoder, rounds=1), 40) == list(range(40))
    path = joined(tmp_path / "alone.mp4", [(picture_file, Disposition.attached_pic)])
    assert "holds no video stream" in sentence(path, decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_stream_of_several_that_ffmpeg_takes(decoder, picture_file, tmp_path):
    small = write_video(tmp_path / "small.mp4", **B_FRAMES)
    large = write_video(tmp_path / "large.mp4", size=(96, 128), **B_FRAMES)
    none, default = Disposition(0), Disposition.default
    for number, (sources, height) in enumerate(
        [
            ([(small, default), (large, none)], 48),
            ([(small, none), (large, default)], 96),
            ([(picture_file, default), (small, none)], 48),
        ]
    ):
        path = joined(tmp_path / f"{number}.mkv", sources)
        if decoder == "decord":
            assert "one of several streams (h264 in matroska); use data.decoder: pyav" in sentence(path, decoder)
        else:
            assert open_video(str(path)).read(np.array([39])).shape[1] == height


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_size_that_changes(decoder, tmp_path):
    parts = [
        write_video(tmp_path / f"{size[0]}.ts", size=size, frames=20, **B_FRAMES) for size in ((48, 64), (96, 128))
    ]
    stream = tmp_path / "changes.ts"
    stream.write_bytes(b"".join(part.read_bytes() for part in parts))
    path = copied(stream, tmp_path / "changes.mkv", stamp_as_stored)
    if decoder == "decord":
        assert "the size of the frames changes" in sentence(path, decoder)
    else:
        assert check_any_subset(path, decoder).shape == (40, 48, 64, 3)


# --- damage and limits


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["some.mp4", "open.mkv", "some.avi"])
def test_concealed_damage_is_refused(name, decoder, tmp_path, capfd):
    """Noise within a picture: frames up to it are right, a group without it is, all others are refused."""
    is_avi = name.endswith("avi")
    options = {"codec": "mpeg4", "bf": 2, "g": 20} if is_avi else {"x264-params": "bframes=3:keyint=20:scenecut=0"}
    whole = write_video(tmp_path / name, frames=60, size=(96, 128), **options)
    frames = np.stack(list(open_video(str(whole), decoder).frames()))

    def damage(number: int, packet: av.Packet) -> None:
        if number == 25:
            data = np.frombuffer(bytes(packet), np.uint8).copy()
            data[len(data) // 2 : len(data) // 2 + 20] ^= 0x55
            packet.update(data.tobytes())

    (tmp_path / "damaged").mkdir()
    path = copied(whole, tmp_path / "damaged" / name, damage)
    found = np.stack(list(open_video(str(path), decoder).frames()))
    assert 15 < len(found) < 30 and (found == frames[: len(found)]).all()
    assert f"{path}: frame " in sentence(path, decoder) and "is damaged" in sentence(path, decoder)
    for index in range(0, 60, 3):
        try:
            assert (open_video(str(path), decoder).read(np.array([index]))[0] == frames[index]).all()
        except DecodeError as error:
            assert (is_avi or 20 <= index < 40) and "is damaged" in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("codec", "name"), [("libx264", "some.mkv"), ("libvpx", "some.webm"), ("flv", "some.flv")])
def test_frames_that_a_cut_file_lacks_are_declared(codec, name, decoder, tmp_path):
    path = write_video(tmp_path / name, codec=codec, frames=60, **{"g": 12})
    assert open_video(str(path), decoder).declared_frames == 60
    assert (probe(path, decoder).declared, probe(path, decoder).error) == (60, None)
    video = open_video(str(cut_off(path, 0.5)), decoder)
    assert 15 < video.num_frames < 45 and 58 <= video.declared_frames <= 62
    assert f"only {video.num_frames} of {video.declared_frames} frames decode" in probe(path, decoder).error


def test_a_cut_ogg_file_is_found(tmp_path):
    path = write_video(tmp_path / "some.ogv", codec="libvpx", frames=60, g=12)
    assert open_video(str(path)).declared_frames == open_video(str(path)).num_frames == 60
    video = open_video(str(cut_off(path, 0.5)))
    assert video.declared_frames > video.num_frames


@pytest.mark.parametrize("name", ["late.mkv", "late.webm"])
def test_a_last_frame_that_is_shown_for_long_is_not_missing(name, tmp_path):
    stamps = [40 * i for i in range(19)] + [5000]
    path = write_video(tmp_path / name, "libx264" if name.endswith("mkv") else "libvpx", 20, stamps=stamps)
    assert open_video(str(path)).declared_frames == 20


@pytest.mark.parametrize("decoder", DECODERS)
def test_absurd_sizes_are_refused_before_decoding(decoder, tmp_path, monkeypatch):
    """A picture of 60000 x 60000 pixels in mid-stream, and a size above the limits in the header."""
    small = write_video(tmp_path / "small.mov", codec="png", frames=4, pix_fmt="rgb24")

    def enlarge(number: int, packet: av.Packet) -> None:
        if number == 2:
            data = bytearray(bytes(packet))
            data[16:24] = (60000).to_bytes(4, "big") * 2  # IHDR
            packet.update(bytes(data))

    assert "cannot be decoded" in sentence(copied(small, tmp_path / "later.mov", enlarge), decoder)
    monkeypatch.setattr(limits, "MAX_SIDE", 60)
    assert "states a size of 64x48 pixels" in sentence(small, decoder)


@needs_decord
def test_decord_names_the_way_out(tmp_path):
    path = write_video(tmp_path / "some.mp4", codec="libsvtav1", frames=5)
    assert sentence(path, "decord").endswith("(av1 in mov); use data.decoder: pyav")
