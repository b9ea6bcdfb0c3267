"""The page: its numbers are the files' numbers, nothing in it runs or is loaded, and it reads in order."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import tarfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import write_tar

from sslscale.config import RunConfig
from sslscale.errors import UserError
from sslscale.features import open_features
from sslscale.report import charts, render
from sslscale.report.collect import collect
from sslscale.report.render import number, percent, run_report, score, size
from sslscale.report.samples import FRAMES, SIDE
from sslscale.rundir import RunDir
from sslscale.shards.sources.moving_digits import encode_mp4


class Page(HTMLParser):
    """Tags with their attributes, table rows as lists of cells, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._cell = False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._cell = self._cell or tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.words.append(data)
        if self._cell:
            self.rows[-1][-1] += data.strip()

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(made) -> Page:
    result = run_report(made.run, made.config)
    return Page(Path(result["path"]).read_text())


def test_compression_is_a_table_and_a_map_with_the_clusters_of_its_points(make_run):
    made = make_run()
    page = page_of(made)
    assert ["SQ8", "4", "4×", "0.247", "0.864", "0.975"] in page.rows
    dots = [attributes for attributes in page.all("path") if attributes["class"] == "dots"]
    shown = made.assignments[::3]
    assert len(dots) == len(np.unique(shown))
    assert [dot["d"].count("M") for dot in dots] == np.unique(shown, return_counts=True)[1].tolist()


def test_the_numbers_of_clusters_that_were_tried_are_drawn(make_run):
    page = page_of(make_run())
    labels = [attributes.get("aria-label") or "" for attributes in page.all("svg")]
    assert "Objective by number of clusters: 2: 4.5, 5: 1.8" in labels
    assert "Stability over halves by number of clusters: 2: 0.7531, 5: 0.7531" in labels
    assert not any(label.startswith(("Davies", "Stability over seeds")) for label in labels)


def test_the_tables_hold_the_numbers_of_the_files(make_run):
    rows = page_of(make_run()).rows
    free = ["0.314", "1.234", "1.068"]
    assert rows[0] == ["Features", "ACC", "NMI", "ARI", "Purity", "Silhouette", "Davies–Bouldin", "Imbalance"]
    assert rows[1] == ["hog", "0.600", "0.902", "0.889", "0.945", *free]
    assert rows[2] == ["pixels", "0.500", "0.902", "0.889", "0.945", *free]
    assert rows[3] == ["this run", "0.943", "0.902", "0.889", "0.945", *free]
    assert rows[4] == ["test only", "0.472", "0.451", "0.445", "0.473", ""]
    assert ["embed/train", "20", "19", "1", "yes"] in rows
    assert ["embed/test", "10", "9", "1", "yes"] in rows
    assert ["anomaly/main", "28", "28", "0", "yes"] in rows
    assert ["embed/test", "1", "the <b>png</b> ends at byte …", "test-lost"] in rows


def test_the_text_holds_the_numbers_of_the_files(make_run):
    made = make_run()
    text = page_of(made).text
    sizes = np.bincount(made.assignments)
    for part in (
        "AUROC 0.731, average precision 0.413",
        "recall@10 0.988",
        "2.0 KiB",
        "500 steps over 8,000 samples (12.5 epochs) on 2 ranks, 80 samples/s, 1.2 % of the time waiting",
        "1 step skipped for not being finite",
        f"28 samples in 5 clusters of {min(sizes)} to {max(sizes)}",
        "Not shown: 1 smaller cluster.",
        "RankMe 41.52",
        "a cpu, 2 cores, 8.0 GiB, a gpu",
        "sslscale run -c x.yaml",
        "run 17",
    ):
        assert part in text, part
    largest = int(np.argmax(sizes))
    assert f"Cluster {largest} {sizes[largest]} samples, {100 * sizes[largest] / 28:.1f} %" in text


def test_a_hostile_key_and_title_stay_text(make_run):
    made = make_run()
    text = Path(run_report(made.run, made.config)["path"]).read_text()
    page = Page(text)
    assert not page.all("script")
    assert "<script" not in text and "<b>" not in text
    hostile = made.keys[0]
    assert any(image["alt"] == hostile and image["title"] == hostile for image in page.all("img"))
    assert hostile in page.text and "A & B" in page.text


def test_nothing_is_loaded_from_outside_and_nothing_runs(make_run):
    made = make_run()
    text = Path(run_report(made.run, made.config)["path"]).read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://|url\(|@import", text)
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for attributes in page.all("a")} == targets


def test_it_reads_in_order_and_every_picture_has_its_key(make_run):
    made = make_run()
    page = page_of(made)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    images = page.all("img")
    assert len(images) == 4 * 3 + 5 * (1 + 2) + 5
    assert {image["alt"] for image in images} <= set(made.keys)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))


def test_without_labels_their_columns_are_absent(make_run):
    page = page_of(make_run(labelled=False))
    assert page.rows[0] == ["Features", "Silhouette", "Davies–Bouldin", "Imbalance"]
    assert page.rows[3] == ["this run", "0.314", "1.234", "1.068"]
    assert "There are no labels" in page.text
    assert "AUROC" not in page.text and "label 0" not in page.text


@pytest.mark.parametrize("missing", ["pretrain", "index", "cluster", "anomaly", "reduce", "baselines"])
def test_a_missing_stage_is_absent(make_run, missing):
    made = make_run()
    sections = {"pretrain": "training", "anomaly": "anomalies", "reduce": "compression"}
    shutil.rmtree(made.run.path / missing)
    page = page_of(made)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    expected = {"measures", "clusters", "anomalies", "compression", "training", "counts", "provenance"}
    gone = {"measures", "clusters"} if missing == "cluster" else {sections.get(missing)}
    assert ids == expected - gone
    assert ("recall@10" in page.text) == (missing != "index")
    assert ("pixels" in page.text) == (missing not in ("baselines", "cluster"))


def test_a_clip_is_as_many_pictures_wide_as_it_has_frames(make_run, tmp_path):
    made = make_run()
    clip = encode_mp4(np.zeros((12, 32, 32), np.uint8))
    for shard in tmp_path.glob("data/train/*.tar"):
        with tarfile.open(shard) as tar:
            keys = [member.name.removesuffix(".png") for member in tar]
        write_tar(shard, [(f"{key}.mp4", clip) for key in keys])
    (tmp_path / "data" / "train" / "shards.json").unlink(missing_ok=True)
    page = page_of(made)
    strips = [image for image in page.all("img") if image.get("style") == f"--frames:{FRAMES}"]
    assert {image["alt"] for image in strips} <= set(made.keys[:19]) and strips
    for image in strips:
        data = base64.b64decode(image["src"].partition(",")[2])
        assert Image.open(io.BytesIO(data)).size == (FRAMES * SIDE, SIDE)
    others = [image for image in page.all("img") if image not in strips]
    assert others and all("style" not in image for image in others)
    style = (Path(render.__file__).parent / "templates" / "style.css").read_text()
    rule = re.search(r"\nimg \{([^}]*)\}", style)[1]
    assert "width: calc(var(--side) * var(--frames, 1))" in rule and "aspect-ratio: var(--frames, 1)" in rule
    assert not re.search(r"img[^{}]*\{[^}]*(width|height): \d+px", style), "a fixed box would squeeze a strip"


def test_the_other_measures_stay_where_there_are_too_many_pairs_for_acc(make_run):
    made = make_run()
    assert "too many pairs" not in page_of(made).text
    for path in made.run.path.glob("**/cluster/main/result.json"):
        result = json.loads(path.read_text())
        for part in (result, *result["datasets"].values()):
            part["measures"]["acc"] = None
        path.write_text(json.dumps(result))
    page = page_of(made)
    assert page.rows[3] == ["this run", "–", "0.902", "0.889", "0.945", "0.314", "1.234", "1.068"]
    assert page.rows[4] == ["test only", "–", "0.451", "0.445", "0.473", ""]
    assert "There are no labels" not in page.text and "too many pairs" in page.text
    assert "NMI 0.902 hog: 0.902" in page.text


def test_the_configuration_is_that_of_the_stages_on_the_page(make_run):
    made = make_run()
    features = open_features(made.run, ["test"])
    made.run.open_stage("cluster", "other", {"num_clusters": 77}, {"features": features.identity})
    configuration = page_of(made).text.partition(" Configuration ")[2]
    assert "cluster/main: datasets: - train - test anomaly/main:" in configuration
    assert "77" not in configuration
    made.config.report = made.config.report.model_copy(update={"exemplars": 1})  # of the command, not of an answer
    assert page_of(made).text.partition(" Configuration ")[2] == configuration


def test_a_page_of_another_name_lies_in_a_folder_of_its_own(make_run):
    made = make_run()
    main = run_report(made.run, made.config)
    text = Path(main["path"]).read_text()
    other = run_report(made.run, made.config, name="other")
    assert Path(other["path"]) == made.run.path / "report" / "other" / "index.html"
    assert json.loads((made.run.path / "report" / "other" / "result.json").read_text()) == other
    assert Path(main["path"]).read_text() == text
    assert "sslscale report · other" in Page(Path(other["path"]).read_text()).text


def test_a_run_at_a_url_is_shown_by_it(make_run, monkeypatch):
    made = make_run()
    monkeypatch.setattr(render.storage, "shown", lambda path: str(path).replace(str(made.run.path), "s3://b/my runs/a"))
    made.config.report = made.config.report.model_copy(update={"title": None})
    result = run_report(made.run, made.config)
    page = Page((made.run.path / "report" / "index.html").read_text())
    assert result["path"] == "s3://b/my runs/a/report/index.html"
    assert "Run s3://b/my runs/a Command" in page.text
    assert "a · sslscale report" in page.text
    assert str(made.run.path) not in page.text
    for store in made.run.path.glob("embed/*/features.json"):
        store.unlink()
    with pytest.raises(UserError) as error:
        run_report(made.run, made.config)
    assert (error.value.got, error.value.fix) == (
        "s3://b/my runs/a",
        "sslscale embed -c CONFIG --run 's3://b/my runs/a'",
    )


def test_what_was_not_read_of_a_store_is_said(make_run):
    made = make_run()
    report = replace(collect(made.run, made.config), unread=1234)
    text = Page(render.render(report, made.config)).text
    assert "1,234 samples are not shown: of shards on a store a report reads at most 8 GiB (report.fetch_gb)." in text
    assert "not shown: of shards" not in page_of(made).text


def test_an_empty_run_and_one_that_is_still_training(tmp_path):
    run, config = RunDir(tmp_path / "run"), RunConfig()
    assert "Provenance" in Path(run_report(run, config)["path"]).read_text()
    (tmp_path / "run" / "pretrain").mkdir()
    (tmp_path / "run" / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert "Not finished." in Path(run_report(run, config)["path"]).read_text()


def test_the_result_says_what_the_page_says(make_run):
    made = make_run()
    result = run_report(made.run, made.config)
    assert result == json.loads((made.run.path / "report" / "result.json").read_text())
    assert (result["failed"], result["counts_add_up"]) == (2, True)
    assert result["bytes"] == Path(result["path"]).stat().st_size
    assert sorted(path.name for path in (made.run.path / "report").iterdir()) == ["index.html", "result.json"]


def test_numbers_as_text():
    assert [number(v) for v in (0, 0.002, 5.82449, 1104.9, 1234567.0, 1.11e-7)] == [
        "0",
        "0.002",
        "5.824",
        "1,105",
        "1.23e+06",
        "1.11e-07",
    ]
    assert [score(v) for v in (0.404, 12.0, 0)] == ["0.4040", "12.00", "0"]
    assert [percent(v) for v in (0.0, 0.0002, 0.5, None)] == ["0.0\xa0%", "<\xa00.1\xa0%", "50.0\xa0%", "–"]
    assert [size(v) for v in (100, 2048, 3 * 2**30, 5 * 2**40)] == ["100 B", "2.0 KiB", "3.0 GiB", "5.0 TiB"]


def test_charts_scale_to_their_range_and_stay_short():
    long = charts.line_chart(range(100_000), np.linspace(1, 3, 100_000).tolist(), "a <long> one")
    points = re.search(r'points="([^"]*)"', long)[1].split()
    assert len(points) == charts.MAX_POINTS
    assert points[0].startswith("0.") and points[-1].startswith("299.")
    assert 'aria-label="a &lt;long&gt; one"' in long
    assert 'points="0,50.0 300,50.0"' in charts.line_chart([7], [1.5], "one")
    bars = charts.bar_chart([4, 2], "bars", ["<four>", "two"], mark=3)
    assert re.findall(r' height="([\d.]+)"', bars) == ["100.00", "50.00"]
    assert "<title>&lt;four&gt;</title>" in bars and 'y1="25.00"' in bars
