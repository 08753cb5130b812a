"""Which frames of a video make a clip: functions of the number of frames; nothing is read.

All indices count from 0, all results are int64 arrays, all lengths L >= 1 and T >= 1 are allowed.

- "kinetics": HMDB51, UCF101, Kinetics. Source: HJYao00/Side4Video, Recognition/datasets/kinetics.py, Video_dataset.
- "something": Something-Something. Source: the same repository, Recognition/datasets/sth.py, Video_dataset.
  Its training frames are TSN's (Wang et al. 2016, section 3), its test frames ATM's.
- "tdn": TDN's segments, of which f neighbouring frames are read. Source: MCG-NJU/TDN, ops/dataset.py, TSNDataSet.
- "tada_segment": T segments between real-valued edges. Source: alibaba-mmai-research/TAdaConv,
  tadaconv/datasets/utils, segment-based sampling.
- "tada_interval": T frames `interval` frames apart at 30 frames a second. Source: the same, interval-based sampling.
- dense: T frames at equal distance inside a window of 128 frames (I3D's protocol).

L is the number of frames of a video, T the number of frames sampled for a clip, f the number of neighbouring frames
that the model reads at each of them. Videos shorter than a clip repeat frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Style = Literal["kinetics", "something", "tdn", "tada_segment", "tada_interval"]

INTERVAL_FPS = 30  # the frames a second that an interval is counted in
DENSE_SPAN = 128  # frames that a dense clip covers


@dataclass(frozen=True)
class ClipSampling:
    """How clips of `num_segments` * `frames_per_segment` frames (T * f) are taken from videos.

    Attributes:
        interval: tada_interval: frames, at 30 a second, from one sampled frame to the next.
    """

    num_segments: int
    style: Style
    dense: bool = False
    frames_per_segment: int = 1
    interval: int = 8

    @property
    def needs_fps(self) -> bool:
        """Whether the frames depend on the frames a second of a video."""
        return self.style == "tada_interval" and not self.dense

    @property
    def clip_frames(self) -> int:
        """T * f, the frames of one clip."""
        return self.num_segments * self.frames_per_segment

    def train(self, num_frames: int, rng: np.random.Generator, fps: float | None = None) -> np.ndarray:
        """The random frames of one training clip: (T * f,).

        Args:
            fps: frames a second of the video, which tada_interval needs.
        """
        T, f = self.num_segments, self.frames_per_segment
        if self.dense or self.style in ("kinetics", "something"):
            indices = train_indices(num_frames, T, self.style, self.dense, rng)
        elif self.style == "tdn":
            indices = tdn_train_indices(num_frames, T, f, rng)
        elif self.style == "tada_segment":
            indices = segment_train_indices(num_frames, T, rng)
        else:
            span = self._span(fps)
            indices = interval_indices(num_frames, T, span, start=rng.uniform(0, max(0.0, num_frames - span)))
        return with_neighbours(indices, num_frames, f)

    def val(self, num_frames: int, fps: float | None = None) -> np.ndarray:
        """The frames of validation's one clip: (T * f,)."""
        if self.dense or self.style in ("kinetics", "something"):
            indices = val_indices(num_frames, self.num_segments, self.style, self.dense)
            return with_neighbours(indices, num_frames, self.frames_per_segment)
        return self.test(num_frames, clips=1, fps=fps)[0]

    def test(self, num_frames: int, clips: int, fps: float | None = None) -> np.ndarray:
        """The frames of the clips of testing: (clips, T * f)."""
        T, f = self.num_segments, self.frames_per_segment
        if self.dense or self.style in ("kinetics", "something"):
            indices = test_indices(num_frames, T, clips, self.style, self.dense)
        elif self.style == "tdn":
            indices = tdn_test_indices(num_frames, T, f, clips)
        elif self.style == "tada_segment":
            indices = segment_test_indices(num_frames, T, clips)
        else:
            span = self._span(fps)
            last = max(0.0, num_frames - span)
            starts = [last / 2] if clips == 1 else [last * clip / clips for clip in range(clips)]
            indices = np.stack([interval_indices(num_frames, T, span, start=start) for start in starts])
        return with_neighbours(indices, num_frames, f)

    def _span(self, fps: float | None) -> float:
        """The frames of a video that a clip of tada_interval covers."""
        if fps is None:
            raise ValueError("data.style tada_interval needs the frames a second of each video (data.fps)")
        return self.num_segments * self.interval * fps / INTERVAL_FPS


def with_neighbours(indices: np.ndarray, num_frames: int, frames_per_segment: int) -> np.ndarray:
    """Replace each index i by i, i + 1, ..., i + f - 1, none beyond the last frame of the video, which repeats.

    Args:
        indices: (..., T), from 0.

    Returns:
        (..., T * f) int64, segment after segment.
    """
    neighbours = np.minimum(indices[..., None] + np.arange(frames_per_segment), num_frames - 1)  # (..., T, f)
    return neighbours.reshape(*indices.shape[:-1], -1)  # (..., T * f)


def train_indices(num_frames: int, T: int, style: Style, dense: bool, rng: np.random.Generator) -> np.ndarray:
    """Random frames of one training clip.

    kinetics: with segments of (L - 1) / T frames, one frame of round(segment * i) .. round(segment * (i + 1)), both
    included, each equally likely. something: if L <= T, all frames and random repeats of them, sorted; else one frame
    of i * L // T .. (i + 1) * L // T - 1. dense: a window whose start is uniform in 0 .. max(0, L - 128).

    Returns:
        (T,) int64, ascending unless dense (a dense clip of a short video wraps around to the first frame).
    """
    if dense:
        return _dense(num_frames, T, int(rng.integers(_last_start(num_frames) + 1)))
    if style == "something":
        if num_frames <= T:
            repeats = rng.integers(num_frames, size=T - num_frames)
            return np.sort(np.concatenate([np.arange(num_frames), repeats]))
        ticks = np.arange(T + 1) * num_frames // T
        return rng.integers(ticks[:-1], ticks[1:])
    borders = np.round(np.arange(T + 1) * _segment(num_frames, T)).astype(np.int64)
    return rng.integers(borders[:-1], borders[1:], endpoint=True)


def val_indices(num_frames: int, T: int, style: Style, dense: bool) -> np.ndarray:
    """The frames of the one clip that validation takes of a video; always the same.

    kinetics: int(L / T * i) mod L. something: round(segment * i) + int(segment / 2), segment = (L - 1) / T.
    dense: the window in the centre; the published code draws its start at random even here, so that two validations
    of one model differ.

    Returns:
        (T,) int64.
    """
    if dense:
        return _dense(num_frames, T, _last_start(num_frames) // 2)
    steps = np.arange(T)
    if style == "something":
        segment = _segment(num_frames, T)
        return np.round(segment * steps).astype(np.int64) + int(segment / 2)
    return (num_frames / T * steps).astype(np.int64) % num_frames


def test_indices(num_frames: int, T: int, clips: int, style: Style, dense: bool) -> np.ndarray:
    """The frames of the clips that testing takes of a video; always the same.

    kinetics: clip starts are floor(linspace(0, L / T - 1, clips)), frames int(start + L / T * i) mod L.
    something: round(segment * i) + int(segment / (clips + 1) * (clip + 1)), segment = (L - 1) / T.
    dense: clip starts are clip * floor(max(0, L - 128) / (clips - 1)); one clip starts at 0, where the published code
    divides by zero.

    Returns:
        (clips, T) int64.
    """
    if dense:
        step = _last_start(num_frames) // max(1, clips - 1)
        return np.stack([_dense(num_frames, T, clip * step) for clip in range(clips)])
    steps, segment = np.arange(T), _segment(num_frames, T)
    if style == "something":
        shifts = (segment / (clips + 1) * np.arange(1, clips + 1)).astype(np.int64)
        return np.round(segment * steps).astype(np.int64) + shifts[:, None]  # (clips, T)
    tick = num_frames / T
    starts = np.floor(np.linspace(0, tick - 1, clips))  # -1 where L < T: the last frame, by the modulo below
    return (starts[:, None] + tick * steps).astype(np.int64) % num_frames  # (clips, T)


test_indices.__test__ = False  # not a test, whatever pytest makes of its name


def _segment(num_frames: int, T: int) -> float:
    return (num_frames - 1) / T


def _last_start(num_frames: int) -> int:
    return max(0, num_frames - DENSE_SPAN)


def _dense(num_frames: int, T: int, start: int) -> np.ndarray:
    """T frames, 128 // T apart (0 apart if T > 128, as published), continuing at the first frame after the last."""
    return (start + np.arange(T) * (DENSE_SPAN // T)) % num_frames


def tdn_train_indices(num_frames: int, T: int, f: int, rng: np.random.Generator) -> np.ndarray:
    """TDN: the random first frames of T segments, each equally likely within its part of the video.

    The last f - 1 frames of a video are no first frames. Where less than one is left for each segment, they are drawn
    together and sorted; videos of at most T frames give the first frame T times.

    Returns:
        (T,) int64, ascending.
    """
    available = num_frames - f + 1
    if available >= T:
        length = available // T
        return np.arange(T) * length + rng.integers(length, size=T)
    if num_frames > T and available > 0:
        return np.sort(rng.integers(available, size=T))
    return np.zeros(T, np.int64)


def tdn_test_indices(num_frames: int, T: int, f: int, clips: int) -> np.ndarray:
    """TDN: the first frames of T segments, for each clip at another distance from the segments' starts.

    One clip takes int(tick / 2 + tick * i), tick = (L - f + 1) / T. Of several clips, clip k takes (k + 1) / (clips + 1)
    in place of 1 / 2; the published code draws them at random. Videos of at most T + f - 1 frames give the first frame.

    Returns:
        (clips, T) int64.
    """
    if num_frames <= T + f - 1:
        return np.zeros((clips, T), np.int64)
    tick = (num_frames - f + 1) / T
    shifts = tick * np.arange(1, clips + 1) / (clips + 1)
    return (shifts[:, None] + tick * np.arange(T)).astype(np.int64)


def segment_train_indices(num_frames: int, T: int, rng: np.random.Generator) -> np.ndarray:
    """TAdaConv's segments: a uniform draw between two edges, rounded to a frame: (T,) int64."""
    edges = _edges(num_frames, T)
    return _nearest_frames(edges[:-1] + (edges[1:] - edges[:-1]) * rng.random(T, np.float32), num_frames)


def segment_test_indices(num_frames: int, T: int, clips: int) -> np.ndarray:
    """TAdaConv's segments: one clip takes their middles, clip k of several (k + 1) / clips of their length.

    Returns:
        (clips, T) int64. The last of several clips takes the ends of the segments, as published.
    """
    edges = _edges(num_frames, T)
    if clips == 1:
        return _nearest_frames((edges[:-1] + edges[1:]) / 2, num_frames)[None]
    shares = np.arange(1, clips + 1, dtype=np.float32) / np.float32(clips)
    return _nearest_frames(edges[:-1] + (edges[1:] - edges[:-1]) * shares[:, None], num_frames)


def interval_indices(num_frames: int, T: int, span: float, *, start: float) -> np.ndarray:
    """TAdaConv's intervals: T frames at equal distance from `start` to `start + span - 1`, none beyond the video.

    Returns:
        (T,) int64.
    """
    frames = np.linspace(start, start + span - 1, T, dtype=np.float64).astype(np.float32)
    return np.clip(frames, 0, num_frames - 1).astype(np.int64)


def _edges(num_frames: int, T: int) -> np.ndarray:
    """The T + 1 edges of TAdaConv's segments: float32, as published."""
    return np.linspace(0, num_frames, T + 1, dtype=np.float32)


def _nearest_frames(positions: np.ndarray, num_frames: int) -> np.ndarray:
    return np.round(np.clip(positions, 0, num_frames - 1)).astype(np.int64)
