"""The line after `pack`."""

from __future__ import annotations

import pytest

from sslscale.config import RunConfig
from sslscale.config.models import PackConfig
from sslscale.report.summary import summary_lines

MANY = {"tif": 1200, "gif": 3, "csv": 1, "md": 1, "txt": 1, "xml": 1}


@pytest.mark.parametrize(
    ("skipped", "said"),
    [({}, ""), ({"tif": 2}, " (skipped: 2 tif)"), (MANY, " (skipped: 1,200 tif, 3 gif, 1 csv, 1 md, 1 txt, ...)")],
)
def test_what_was_skipped_is_said(skipped, said):
    config = RunConfig.model_construct(run="r", pack=PackConfig(source="imagefolder", output="out"))
    result = {"samples": 5, "splits": {"train": {"shards": 1}}, "skipped": skipped}
    assert summary_lines(config, {"pack": result})[0] == f"pack       5 samples in 1 shards, out{said}"
