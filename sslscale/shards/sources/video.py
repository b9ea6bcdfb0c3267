"""Clips in folders, as `imagefolder` has images: `root/class/*.mp4`, or flat `root/*.mp4` without labels."""

from __future__ import annotations

from collections.abc import Mapping

from sslscale.shards.sources.imagefolder import ImageFolder


class Video(ImageFolder):
    """Files are copied as they are."""

    name, kind = "video", "clips"
    extensions: Mapping[str, str] = {"mp4": "mp4"}
