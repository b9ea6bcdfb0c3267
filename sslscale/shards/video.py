"""Clips from mp4 bytes: only the frames that are wanted are kept, and only what leads up to them is decoded."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sslscale.errors import missing_package
from sslscale.shards.decode import DecodeError, find_member, fit_square
from sslscale.shards.readers import Reader

_WORTH_A_JUMP = 4  # packets: a decoder that starts anew holds back the first few frames
_FORMATS = {1: "gray", 3: "rgb24"}


@dataclass(frozen=True)
class ClipReader(Reader):
    """uint8 (T, C, H, W): `frames` frames spread evenly over the clip; see decode_clip."""

    frames: int
    channels: int
    size: int | None

    def content(self, sample: dict[str, Any]) -> bytes:
        return find_member(sample, ("mp4",), "video")[1]

    def read(self, sample: dict[str, Any]) -> np.ndarray:
        return decode_clip(sample, self.frames, self.channels, self.size)


def decode_clip(sample: dict[str, Any], frames: int, channels: int, size: int | None) -> np.ndarray:
    """uint8 (T, C, H, W): the frames in the middle of T = `frames` equal parts of the clip.

    The clip is what a player shows: frames that an edit list cuts off (`ffmpeg -ss T -c copy` leaves them in the file)
    are not of it. But a frame is as it is stored: a rotation that the file asks of its player is not applied.
    A clip of fewer frames than that shows some of them several times. With `size`, a frame's shorter side is resized to
    that (bilinear, antialiased) and the centre size x size kept. Raises DecodeError where there is no video, where a
    wanted frame is damaged or of another size, and where the file ends before the frames that it promises.
    """
    extension, data = find_member(sample, ("mp4",), "video")
    av = _av()
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.streams.video:
                raise DecodeError(f"the .{extension} has no video")
            convert = av.video.reformatter.VideoReformatter().reformat  # a frame's own starts threads for each
            wanted = _wanted(container, frames, extension)
            found = [convert(frame, format=_FORMATS[channels], threads=1).to_ndarray() for frame in wanted]
    except av.FFmpegError as error:
        raise DecodeError(f"the .{extension} cannot be decoded: {error.strerror}") from None
    sizes = dict.fromkeys(f"{frame.shape[0]}x{frame.shape[1]}" for frame in found)
    if len(sizes) > 1:
        raise DecodeError(f"the .{extension} changes its size: {', '.join(sizes)}")
    pixels = torch.from_numpy(np.stack(found))
    clip = pixels[:, None] if channels == 1 else pixels.permute(0, 3, 1, 2)  # (T, C, H, W)
    return (clip if size is None else fit_square(clip, size, extension)).contiguous().numpy()


def _wanted(container: Any, count: int, extension: str) -> Iterator[Any]:
    """The wanted frames in order. Their times come from the packets, without decoding, and so hold at any rate."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # several clips are decoded at a time
    promised = min(stream.frames, len(stream.index_entries))  # an edit list may leave the last ones out of the index
    packets = list(container.demux(stream))  # compressed: no more than the file
    stored = [packet for packet in packets if packet.pts is not None]
    if not stored or len(stored) < promised:
        raise DecodeError(f"the .{extension} ends early: {len(stored)} of {promised} frames")
    times = np.sort([packet.pts for packet in stored if not packet.is_discard])
    if not len(times):
        raise DecodeError(f"the .{extension} shows none of its {len(stored)} frames: an edit list cuts them off")
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe and packet.pts is not None]
    decoded: deque[Any] = deque()
    place, frame = 0, None
    for time in times[((np.arange(count) + 0.5) * len(times) / count).astype(np.int64)].tolist():
        key = max((key for key in keys if packets[key].pts <= time), default=0)
        if key > place + _WORTH_A_JUMP:
            stream.codec_context.flush_buffers()
            decoded.clear()
            place, frame = key, None
        while frame is None or frame.pts < time:
            while not decoded and place < len(packets):
                decoded.extend(packets[place].decode())
                place += 1
            if not decoded:
                raise DecodeError(f"the .{extension} ends within its frames")
            frame = decoded.popleft()
        if frame.pts != time or frame.is_corrupt:
            raise DecodeError(f"the .{extension} has a damaged frame")
        yield frame


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise missing_package("av", "video") from None
    return av
