"""What stores say of shards: the same in a listing as one by one, and another thing once a shard was written again."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import fsspec
import pytest

from sslscale.shards import location
from sslscale.shards.location import Stored, list_folder, look, open_location


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "s3":
        yield request.getfixturevalue("s3")
    elif request.param == "local":
        (tmp_path / "shards").mkdir()
        yield str(tmp_path / "shards")
    else:
        yield "memory://versions"
        fsspec.filesystem("memory").rm("/versions", recursive=True)


def test_a_version_is_another_after_a_file_was_written_again(folder):
    fs, path = open_location(folder)
    fs.pipe_file(f"{path}/a.tar", b"first")
    first = look(fs, f"{path}/a.tar", folder)
    assert first.bytes == 5 and first.version is not None
    assert list_folder(fs, path, folder, None) == {"a.tar": first}
    fs.pipe_file(f"{path}/a.tar", b"other")
    if "://" not in folder:
        os.utime(f"{path}/a.tar", (0, 1))
    other = look(fs, f"{path}/a.tar", folder)
    assert other.bytes == 5 and other.version != first.version


def test_a_hash_says_more_than_a_time_and_a_time_is_written_in_one_way():
    moment = datetime(2024, 5, 1, 12, 0, 0, 250_000, UTC)
    assert location._stored({"size": 1, "ETag": '"ab"', "LastModified": moment}) == Stored(1, 'ETag:"ab"')
    assert location._stored({"size": 1, "created": moment}) == location._stored(
        {"size": 1, "created": moment.timestamp()}
    )
    assert location._stored({"size": 1, "mtime": 1.25, "created": 2.0}) == Stored(1, "mtime:1.250000")
    assert location._stored({"size": 1, "ETag": ""}) == Stored(1, None)


def test_of_a_web_server_only_what_shards_json_does_not_know_is_asked():
    class Web:
        protocol = ("http", "https")
        asked: list[str] = []  # noqa: RUF012

        def info(self, path):
            self.asked.append(path)
            return {"size": 7, "ETag": "x"}

    known = {"a.tar": {"bytes": 5, "sha256": "0"}, "b.tar": {"bytes": 5, "sha256": None}}
    web = Web()
    assert list_folder(web, "http://h/f", "http://h/f", known) == {
        "a.tar": Stored(5, None),
        "b.tar": Stored(7, "ETag:x"),
    }
    assert web.asked == ["http://h/f/b.tar"]
