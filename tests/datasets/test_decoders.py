"""Every decoder gives the same frames for the same indices, or one sentence that names the file."""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from datasets.decoders import DecodeError, DecoderMissing, base, decord_file, open_video, pyav_file
from tests.helpers.video_files import cut_off, overwrite, picture, write_video

HAS_DECORD = importlib.util.find_spec("decord") is not None
needs_decord = pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")
DECODERS = ["pyav", pytest.param("decord", marks=needs_decord)]

# Colour conversion differs by at most 2 of 255, but for what needs the chroma to be interpolated: odd sizes, 10 bits
# and interlaced pictures, of which these synthetic frames, full of edges, differ by this much on average.
TOLERANCE, INTERPOLATED = 2, 6


def sentence(path, decoder, indices=None) -> str:
    with pytest.raises(DecodeError) as caught:
        video = open_video(str(path), decoder)
        video.read(np.arange(video.num_frames) if indices is None else np.array(indices))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def check_any_subset(path, decoder, rounds=4) -> np.ndarray:
    """Reads of any frames, by a new and by a used handle, equal the decoding from the start, which is returned."""
    video = open_video(str(path), decoder)
    whole = np.stack(list(open_video(str(path), decoder).frames()))
    assert len(whole) == video.num_frames <= video.declared_frames
    assert whole.shape[1:] == (video.height, video.width, 3) and whole.dtype == np.uint8
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        indices = np.append(rng.integers(len(whole), size=6), [len(whole) - 1, 0, 0])
        assert (open_video(str(path), decoder).read(indices) == whole[indices]).all()
        assert (video.read(indices) == whole[indices]).all()
    return whole


def check_damaged(path, decoder, declared) -> None:
    """Reading is refused; extraction gets the frames there are, and can tell."""
    video = open_video(str(path), decoder)
    assert f"{path}: cannot be decoded" in sentence(path, decoder)
    assert 0 < len(list(video.frames())) < video.declared_frames == declared


def shown(frames: np.ndarray, count: int) -> list[int]:
    """Which picture each frame is nearest to."""
    pictures = np.stack([picture(i, *frames.shape[1:3]) for i in range(count)]).astype(int)
    return [int(np.abs(pictures - frame).mean((1, 2, 3)).argmin()) for frame in frames]


UNEVEN = [40 * i + 7 * (i * i % 5) + (300 if i > 20 else 0) for i in range(40)]
OPEN = "open-gop=1:bframes=2:b-adapt=0:keyint=20:min-keyint=20:scenecut=0"
MADE = {
    "uneven.mp4": {"stamps": UNEVEN, "x264-params": "bframes=2:keyint=15"},
    "uneven.mkv": {"stamps": UNEVEN, "x264-params": "bframes=2:keyint=15"},
    "pyramid.mp4": {"frames": 80, "x264-params": "bframes=5:b-pyramid=normal:keyint=30:ref=4"},
    "open.mp4": {"frames": 100, "x264-params": OPEN},
    "open.mkv": {"frames": 100, "x264-params": OPEN},
    "open_short.mp4": {"frames": 60, "x264-params": OPEN.replace("20", "9")},
    "refresh.mkv": {"frames": 80, "x264-params": "intra-refresh=1:keyint=20:bframes=0"},
    "hevc.mp4": {"codec": "libx265", "frames": 60, "x265-params": f"log-level=none:{OPEN}"},
    "vp8.webm": {"codec": "libvpx", "frames": 60, "auto-alt-ref": 1, "lag-in-frames": 16, "b": "60k"},
    "vp9.webm": {"codec": "libvpx-vp9", "auto-alt-ref": 1, "lag-in-frames": 16, "g": 15},
    "plain.avi": {"codec": "mpeg4", "bf": 0, "g": 12},
    "b.avi": {"codec": "mpeg4", "bf": 2, "g": 12},
    "h264.avi": {"x264-params": "bframes=2:keyint=15"},
    "mpeg.mpg": {"codec": "mpeg1video", "bf": 2, "g": 12},
    "flash.flv": {"x264-params": "bframes=2:keyint=15"},
    "grey.mp4": {"pix_fmt": "gray"},
    "full_range.mp4": {"pix_fmt": "yuvj420p"},
    "bt709.mp4": {"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"},
    "narrow.mkv": {"codec": "ffv1", "size": (48, 48), "pix_fmt": "yuv444p"},
    "odd_lossless.mkv": {"codec": "ffv1", "size": (47, 63), "pix_fmt": "yuv444p"},
    "odd.mkv": {"codec": "mpeg4", "size": (47, 63)},
    "odd.webm": {"codec": "libvpx-vp9", "size": (47, 63)},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "interlaced.mp4": {"size": (64, 64), "x264-params": "interlaced=1:bframes=2:keyint=15"},
}
INTERPOLATING = {"odd.mkv", "odd.webm", "ten_bits.mp4", "interlaced.mp4"}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", MADE)
def test_made_files(name, decoder, tmp_path, capfd):
    path = write_video(tmp_path / name, **MADE[name])
    capfd.readouterr()  # what the encoders say
    frames = MADE[name].get("frames", 40)
    found = check_any_subset(path, decoder, rounds=2)
    if name != "grey.mp4":
        assert shown(found, frames) == list(range(frames))
    for index in range(0, frames, 3):  # each by itself, after a seek
        assert (open_video(str(path), decoder).read(np.array([index]))[0] == found[index]).all(), index
    assert capfd.readouterr() == ("", "")


@needs_decord
@pytest.mark.parametrize("name", MADE)
def test_decoders_give_the_same_frames(name, tmp_path):
    path = write_video(tmp_path / name, **MADE[name])
    one, two = (np.stack(list(open_video(str(path), decoder).frames())) for decoder in ("decord", "pyav"))
    difference = np.abs(one.astype(int) - two)
    if name in INTERPOLATING:
        assert difference.mean() < INTERPOLATED
    else:
        assert difference.max() <= TOLERANCE


@pytest.mark.parametrize(
    ("decoder", "decode_all"), [("pyav", "_by_count"), pytest.param("decord", "_from_start", marks=needs_decord)]
)
@pytest.mark.parametrize("name", ["uneven.mp4", "pyramid.mp4", "open.mkv", "hevc.mp4", "vp9.webm", "plain.avi"])
def test_usual_files_are_not_decoded_from_their_start(name, decoder, decode_all, tmp_path):
    video = open_video(str(write_video(tmp_path / name, **MADE[name])), decoder)
    setattr(video, decode_all, None)
    video.read(np.arange(0, video.num_frames, 7))
    assert video._kept is None


@pytest.mark.parametrize("decoder", DECODERS)
def test_damage_inside(decoder, tmp_path, capfd):
    path = overwrite(
        write_video(tmp_path / "some.mp4", frames=100, **{"x264-params": "bframes=2:keyint=15"}), 0.5, 0.55
    )
    capfd.readouterr()  # what the encoders say
    if decoder == "pyav":
        check_damaged(path, decoder, declared=100)
    else:  # decord decodes ahead: on a short file, it meets the damage before or after it gives the first frame
        assert "cannot be decoded" in sentence(path, decoder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("b_frames", [0, 2])
def test_truncated(b_frames, decoder, tmp_path):
    """An MP4 has its index at its end; an AVI gives the frames that are there."""
    path = cut_off(write_video(tmp_path / "part.mp4", frames=100), 0.6)
    assert "cannot be decoded" in sentence(path, decoder)
    path = cut_off(write_video(tmp_path / "part.avi", codec="mpeg4", frames=100, bf=b_frames), 0.6)
    frames = check_any_subset(path, decoder, rounds=1)
    assert open_video(str(path), decoder).num_frames == len(frames) and 30 < len(frames) < 60
    assert shown(frames[:-1], 100) == list(range(len(frames) - 1))  # the last one is cut


def not_coded(time: int) -> bytes:
    """A packet of MPEG-4 that says "nothing changed" and gives no frame (ISO/IEC 14496-2, 6.2.5: vop_coded is 0)."""
    bits = f"01{'0'}1{time % 25:05b}100"  # P; no full second; marker; time; marker, not coded, padding
    bits += "1" * (-len(bits) % 8)
    return b"\0\0\1\xb6" + int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.mark.parametrize("decoder", DECODERS)
def test_packets_without_a_frame(decoder, tmp_path):
    whole, path = write_video(tmp_path / "whole.avi", codec="mpeg4", bf=0, g=12), tmp_path / "hollow.avi"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = []
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packets.append((bytes(packet), packet.is_keyframe))
            packets += [(not_coded(number), False)] * (number in (5, 12))
        for number, (data, is_keyframe) in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, stream.time_base, is_keyframe
            packet.pts, packet.dts, packet.duration = number, number, 1
            target.mux(packet)
    video = open_video(str(path), decoder)
    assert (video.num_frames, video.declared_frames) == (40, 42)
    assert shown(check_any_subset(path, decoder), 40) == list(range(40))


@pytest.mark.parametrize("decoder", DECODERS)
def test_files_too_large_to_keep_are_decoded_again(decoder, tmp_path, monkeypatch):
    path = write_video(tmp_path / "b.avi", **MADE["b.avi"])
    kept = check_any_subset(path, decoder, rounds=1)
    for module in (decord_file, pyav_file):
        monkeypatch.setattr(module, "KEEP_BYTES", 0)
    assert (check_any_subset(path, decoder, rounds=1) == kept).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_order_repeats_and_indices_that_are_not_there(decoder, tmp_path):
    path = write_video(tmp_path / "vp9.webm", **MADE["vp9.webm"])
    frames = open_video(str(path), decoder).read(np.array([7, 3, 7, 7]))
    assert (frames[0] == frames[2]).all() and (frames[0] == frames[3]).all() and (frames[0] != frames[1]).any()
    assert "frame 40 is requested, the file holds 40 frames" in sentence(path, decoder, [0, 40])
    assert "frame -1 is requested" in sentence(path, decoder, [-1])


def test_only_wanted_frames_are_converted(tmp_path, monkeypatch):
    video = open_video(str(write_video(tmp_path / "vp9.webm", **MADE["vp9.webm"])), "pyav")
    converted = []
    real = video._rgb
    monkeypatch.setattr(video, "_rgb", lambda frame: converted.append(frame.pts) or real(frame))
    video.read(np.array([7, 3, 7, 7]))
    assert len(converted) == 2


def read_two(path, decoder):
    return open_video(path, decoder).read(np.array([0, 5])).shape


@pytest.mark.parametrize("decoder", DECODERS)
def test_worker_processes_are_silent(decoder, tmp_path, capfd):
    """The file has metadata that is not UTF-8, and B-frames without time stamps, of which FFmpeg complains."""
    path = write_video(tmp_path / "b.avi", metadata={"title": "NAME"}, **MADE["b.avi"])
    data = path.read_bytes()
    assert data.count(b"NAME") == 1
    path.write_bytes(data.replace(b"NAME", b"\xe9\xff\xfe\xe8"))
    capfd.readouterr()  # what the encoders say
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_two, (str(path), decoder)) == (2, 48, 64, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("decoder", DECODERS)
def test_container_without_a_packet(decoder, tmp_path):
    with av.open(str(tmp_path / "hollow.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    assert "can" in sentence(tmp_path / "hollow.mkv", decoder)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation(rotation, container, decoder, tmp_path):
    path = write_video(tmp_path / f"turned.{container}", frames=3, rotation=rotation)
    video = open_video(str(path), decoder)
    frames = check_any_subset(path, decoder, rounds=1)
    assert (video.height, video.width) == ((48, 64) if rotation == 180 else (64, 48))
    assert shown(np.rot90(frames, -rotation // 90, axes=(1, 2)), 3) == [0, 1, 2]


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_that_an_edit_list_hides_do_not_count(decoder, tmp_path):
    stamps = [40 * (i - 6) for i in range(40)]
    path = write_video(tmp_path / "edited.mp4", stamps=stamps, **{"x264-params": "bframes=2:keyint=15"})
    assert shown(check_any_subset(path, decoder), 40) == list(range(6, 40))


@pytest.mark.parametrize("decoder", DECODERS)
def test_pictures_before_the_first_complete_one_do_not_count(decoder, tmp_path):
    """A stream cut at an open GOP starts with pictures that depend on what is gone."""
    whole = write_video(tmp_path / "whole.mkv", frames=60, **{"x264-params": OPEN})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        first = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[first:]:
            packet.stream = stream
            target.mux(packet)
    assert shown(check_any_subset(tmp_path / "cut.mkv", decoder), 60) == list(range(20, 60))
    assert open_video(str(tmp_path / "cut.mkv"), decoder).declared_frames > 40


def test_transport_streams_are_read_by_pyav_alone(tmp_path):
    path = write_video(tmp_path / "stream.ts", **{"x264-params": "bframes=2:keyint=15"})
    assert shown(check_any_subset(path, "pyav"), 40) == list(range(40))
    if HAS_DECORD:
        assert "(h264 in mpegts); use data.decoder: pyav" in sentence(path, "decord")


@pytest.mark.parametrize("decoder", DECODERS)
def test_truncated_matroska(decoder, tmp_path):
    content = write_video(tmp_path / "whole.mkv", stamps=UNEVEN, **{"x264-params": "bframes=0"}).read_bytes()
    path = tmp_path / "part.mkv"
    path.write_bytes(content[: len(content) * 2 // 3])
    frames = check_any_subset(path, decoder)
    assert 5 < len(frames) < 40 and shown(frames, 40) == list(range(len(frames)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_sound_alone(decoder, tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        sound.sample_rate, sound.pts = 16000, 0
        sound.planes[0].update(bytes(sound.planes[0].buffer_size))
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert "holds no video stream" in sentence(path, decoder)


# --- no video, no library


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_video_at_all(decoder, tmp_path):
    (tmp_path / "empty.avi").touch()
    (tmp_path / "text.mp4").write_text("hello" * 100)
    (tmp_path / "zeros.avi").write_bytes(bytes(10000))
    assert "is empty" in sentence(tmp_path / "empty.avi", decoder)
    assert "cannot be decoded" in sentence(tmp_path / "text.mp4", decoder)
    assert "cannot be decoded" in sentence(tmp_path / "zeros.avi", decoder)
    assert "no such file" in sentence(tmp_path / "none.avi", decoder)
    assert "no such file" in sentence(tmp_path, decoder)


NO_DECORD = """
import sys
sys.modules["decord"] = None  # as if it were not installed
import train_vision, test_vision, datasets.build, datasets.check.__main__, datasets.prepare.__main__
from datasets.decoders import open_video
assert open_video(sys.argv[1]).num_frames == 40
assert {name for name in sys.modules if name.split(".")[0] == "decord"} == {"decord"}
"""


def test_nothing_needs_decord_unless_asked(tmp_path):
    path = write_video(tmp_path / "some.mp4")
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", NO_DECORD, str(path)], check=True, cwd=root)


@pytest.mark.parametrize(("decoder", "package"), [("decord", "decord"), ("pyav", "av")])
def test_missing_library(decoder, package, tmp_path, monkeypatch):
    (tmp_path / "some.avi").write_text("hello")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DecoderMissing) as caught:
        open_video(str(tmp_path / "some.avi"), decoder)
    assert str(caught.value) == f"data.decoder: {decoder} needs the package {package}: pip install {package}"


def test_unknown_decoder(tmp_path):
    with pytest.raises(ValueError, match="data.decoder: cv2 is none of pyav, decord"):
        open_video(str(tmp_path / "some.avi"), "cv2")


def test_errors_of_ours_are_not_taken_for_the_files():
    with pytest.raises(AttributeError), base.decoding("some.avi"):
        raise AttributeError("a slip")
