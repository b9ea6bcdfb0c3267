"""Clips from mp4: the wanted frames, exactly, and what cannot be read."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from tars import encode_sound

from sslscale.errors import UserError
from sslscale.shards import video
from sslscale.shards.decode import DecodeError
from sslscale.shards.sources import make_source
from sslscale.shards.sources.moving_digits import FRAMES, MOTIONS, SIDE, MovingDigits, encode_mp4
from sslscale.shards.video import ClipReader, decode_clip


def counted(frames):
    """(T, 32, 32): frame t is grey 4 t, with a white corner."""
    clip = np.repeat((4 * np.arange(frames, dtype=np.uint8))[:, None, None], 32, axis=1).repeat(32, axis=2)
    clip[:, :8, :8] = 255
    return clip


@pytest.fixture(scope="module")
def long_clip():
    return encode_mp4(counted(48), key_every=12)


@pytest.mark.parametrize("count", [1, 2, 5, 48])
def test_the_frames_in_the_middle_of_equal_parts(long_clip, count):
    clip = decode_clip({"mp4": long_clip}, count, 1, None)
    assert clip.shape == (count, 1, 32, 32) and clip.dtype == np.uint8
    expected = [int((part + 0.5) * 48 / count) for part in range(count)]
    found = clip[:, 0, 16:, 16:].astype(float).mean(axis=(1, 2)) / 4
    assert np.abs(found - expected).max() < 0.5


class Counting:
    """A container, or a packet of it, that counts the frames that are decoded."""

    def __init__(self, of, counts):
        self.of, self.counts = of, counts

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.of.close()

    def __getattr__(self, name):
        return getattr(self.of, name)

    def demux(self, stream):
        return (Counting(packet, self.counts) for packet in self.of.demux(stream))

    def decode(self):
        frames = self.of.decode()
        self.counts.append(len(frames))
        return frames


def test_only_what_leads_up_to_the_frames_is_decoded(long_clip, monkeypatch):
    counts = []

    def open_counting(*arguments, **options):
        return Counting(av.open(*arguments, **options), counts)

    with av.open(io.BytesIO(long_clip)) as container:
        packets = sorted((p.pts, p.is_keyframe) for p in container.demux(video=0) if p.pts is not None)
    keys = [number for number, (_, is_key) in enumerate(packets) if is_key]
    wanted = [8, 24, 40]
    assert len(keys) > 3  # at least one between any two that are wanted
    monkeypatch.setattr(video, "_av", lambda: SimpleNamespace(**{**vars(av), "open": open_counting}))
    decode_clip({"mp4": long_clip}, 3, 1, None)
    needed = sum(1 + frame - max(key for key in keys if key <= frame) for frame in wanted)
    assert needed <= sum(counts) <= needed + 3


def cut_clip(clip, start, shown=None):
    """As `ffmpeg -ss -c copy` cuts: from the keyframe before `start` on, with an edit list that begins at `start`.

    With `shown`, the edit list ends after that share of what is left.
    """
    data = io.BytesIO()
    with av.open(io.BytesIO(clip)) as source, av.open(data, "w", format="mp4") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.pts is not None]
        begin = sorted(packet.pts for packet in packets)[start]
        key = max(at for at, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= begin)
        for packet in packets[key:]:
            packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, stream
            container.mux(packet)
    cut = bytearray(data.getvalue())
    if shown is not None:
        at = cut.index(b"elst") + 12  # the segment's duration, of an atom of version 0 with one entry
        cut[at : at + 4] = int(shown * int.from_bytes(cut[at : at + 4], "big")).to_bytes(4, "big")
    return bytes(cut)


@pytest.mark.parametrize(("shown", "frames"), [(None, 31), (0.5, 16)])
def test_frames_that_an_edit_list_cuts_off_are_not_of_the_clip(long_clip, shown, frames):
    clip = cut_clip(long_clip, 17, shown)
    for count in (1, 4, frames):
        expected = [17 + int((part + 0.5) * frames / count) for part in range(count)]
        found = decode_clip({"mp4": clip}, count, 1, None)[:, 0, 16:, 16:].astype(float).mean(axis=(1, 2)) / 4
        assert np.abs(found - expected).max() < 0.5


def test_an_edit_list_that_shows_nothing_says_so(long_clip, monkeypatch):
    with av.open(io.BytesIO(long_clip)) as container:
        packets = [SimpleNamespace(pts=packet.pts, is_discard=True) for packet in container.demux(video=0)]
        container = SimpleNamespace(streams=container.streams, demux=lambda stream: packets)
        with pytest.raises(DecodeError, match="shows none of its 48 frames"):
            next(video._wanted(container, 2, "mp4"))


def test_colour_size_and_clips_that_are_too_short(long_clip):
    assert decode_clip({"mp4": long_clip}, 4, 3, 16).shape == (4, 3, 16, 16)
    short = decode_clip({"mp4": encode_mp4(counted(3))}, 6, 1, None)
    assert all(np.array_equal(short[2 * i], short[2 * i + 1]) for i in range(3))
    assert not np.array_equal(short[0], short[2])


def test_a_clip_that_cannot_be_read_says_why(long_clip):
    reader = ClipReader(8, 1, None)
    cases = {
        "has no video": encode_sound(),
        "cannot be decoded: Invalid data": long_clip[: len(long_clip) // 2],
        "cannot be decoded": b"not a video",
    }
    for reason, data in cases.items():
        with pytest.raises(DecodeError, match=reason):
            reader.read({"mp4": data})
    with pytest.raises(DecodeError, match="no video among the members: txt"):
        reader.read({"txt": b"words"})


def test_a_missing_package_is_an_error_with_the_line_that_installs_it(long_clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'sslscale\[video\]'"):
        decode_clip({"mp4": long_clip}, 2, 1, None)


def test_moving_digits_are_the_same_every_time_and_of_other_digits_in_test():
    source, again = (MovingDigits(clips=8) for _ in range(2))
    assert source.splits == {"train": 8, "test": 2}
    example = source.example("train", 3)
    assert example == again.example("train", 3) and example.data != source.example("test", 0).data
    frames, labels = source.clip("train", 3)
    assert frames.shape == (FRAMES, SIDE, SIDE) and example.label == labels["motion"] < len(MOTIONS)
    assert MovingDigits(clips=8, label="digit").example("train", 3).label == labels["digit"]
    decoded = decode_clip({"mp4": example.data}, FRAMES, 1, None)[:, 0]
    assert np.abs(decoded.astype(int) - frames).mean() < 2
    with pytest.raises(UserError, match="no such label"):
        MovingDigits(label="speed")


def test_clips_in_folders_are_copied_as_they_are(tmp_path, long_clip):
    for name in ("b/1.mp4", "a/2.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(long_clip)
    source = make_source("video", str(tmp_path))
    first = source.example("train", 0)
    assert (first.data, first.extension, first.label, first.metadata["class"]) == (long_clip, "mp4", 0, "a")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no clips here"):
        make_source("video", str(tmp_path / "none"))


def changing_clip():
    """Eight frames of 32x32, then eight of 64x64, in one stream."""
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for start, side in ((0, 32), (8, 64)):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = side, side, "yuv420p"
            encoder.time_base, encoder.framerate, encoder.options = Fraction(1, 8), 8, {"tune": "zerolatency"}
            for number in [*range(start, start + 8), None]:
                frame = None
                if number is not None:
                    frame = av.VideoFrame.from_ndarray(np.full((side, side), 16 * number, np.uint8), format="gray")
                    frame.pts, frame.time_base = number, encoder.time_base
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
    return data.getvalue()


def test_a_clip_whose_frames_change_in_size_says_why():
    assert decode_clip({"mp4": changing_clip()}, 1, 1, None).shape == (1, 1, 64, 64)
    with pytest.raises(DecodeError, match=r"the \.mp4 changes its size: 32x32, 64x64"):
        decode_clip({"mp4": changing_clip()}, 4, 1, 16)
