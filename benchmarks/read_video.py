"""Decoding clips: ours against plain PyAV on the same bytes, for the same frames.

Plain: `for frame in container.decode(video=0)`, keeping the wanted frames, as PyAV's documentation reads a file. Three
cases: every frame of short clips, 8 frames of short clips, and 8 frames of longer clips with a key frame every 12.

    python benchmarks/read_video.py [--clips 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import av
import numpy as np
from common import interleave, write_result

from sslscale.shards.sources.moving_digits import MovingDigits, encode_mp4
from sslscale.shards.video import decode_clip


def plain(data: bytes, count: int) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(((np.arange(count) + 0.5) * stream.frames / count).astype(int).tolist())
        frames = enumerate(container.decode(stream))
        return np.stack([frame.to_ndarray(format="gray") for number, frame in frames if number in wanted])


def long_clips(count: int) -> list[bytes]:
    """96 frames of 128 x 128: textures that go across the frame."""
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(count):
        texture = rng.integers(0, 255, (16, 16), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        clips.append(encode_mp4(np.stack([np.roll(texture, 2 * t, axis=1) for t in range(96)]), key_every=12))
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    source = MovingDigits(clips=arguments.clips)
    short = [source.example("train", index).data for index in range(arguments.clips)]
    cases = {
        "16 of 16 frames": (short, 16),
        "8 of 16 frames": (short, 8),
        "8 of 96 frames": (long_clips(arguments.clips // 4), 8),
    }
    rows: dict[str, Any] = {}
    for name, (clips, count) in cases.items():
        assert all(
            np.array_equal(decode_clip({"mp4": clip}, count, 1, None)[:, 0], plain(clip, count)) for clip in clips
        )
        seconds = interleave(
            {
                "plain": lambda clips=clips, count=count: [plain(clip, count) for clip in clips],
                "ours": lambda clips=clips, count=count: [decode_clip({"mp4": clip}, count, 1, None) for clip in clips],
            },
            arguments.repeats,
        )
        rows[name] = {
            "clips_per_second": {which: len(clips) / value for which, value in seconds.items()},
            "ratio": seconds["plain"] / seconds["ours"],
        }
        print(f"{name:<20}{rows[name]['ratio']:>7.3f}")
    write_result(
        "read-video",
        {"what": "clips/s decoded, ours and plain PyAV", "required": 0.95, "settings": vars(arguments), "cases": rows},
    )


if __name__ == "__main__":
    main()
