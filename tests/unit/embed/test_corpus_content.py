"""Which shard of a corpus is another one by now, by what is known of its content."""

from __future__ import annotations

import pytest

from sslscale.embed.corpus import Corpus
from sslscale.shards.dataset import ShardInfo, ShardSet

HASHED = {"sha256": "a" * 64}
COUNTED = {"layout": "b" * 16}


def corpus_of(folder, **content):
    return Corpus.of(ShardSet("s", [ShardInfo("a.tar", "s/a.tar", 3, 10_240, **content)]), folder)


@pytest.mark.parametrize("before", [HASHED, COUNTED, {}])
@pytest.mark.parametrize("now", [HASHED, COUNTED, {}, {"sha256": "c" * 64}, {"layout": "d" * 16}])
def test_contents_are_compared_where_both_are_known_in_one_way(tmp_path, before, now):
    first = corpus_of(tmp_path, **before)
    first.save(tmp_path)
    found = corpus_of(tmp_path, **now)
    is_other = before.keys() == now.keys() and before != now
    assert found.changed == (["a.tar"] if is_other else [])
    assert (found.origin == first.origin) is not is_other
