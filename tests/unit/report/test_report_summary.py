"""The lines after a command."""

from __future__ import annotations

import subprocess
import sys

from sslscale.report.summary import summary_lines


def test_a_whole_run(make_run):
    made = make_run()
    run = made.run.path
    results = {**made.results(), "report": {"path": f"{run}/report/index.html"}}
    assert summary_lines(made.config, results) == [
        "pretrain   500 steps on 2 ranks, ZeRO 1, bf16: "
        "80 samples/s  1.2% waiting for data  RankMe 41.5  feature std 0.0493  1 step skipped (not finite)",
        f"embed      19 features of train, 4 wide: 1,234 samples/s (1 failed, see {run}/embed/train/failed)",
        f"embed      9 features of test, 4 wide: 1,234 samples/s (1 failed, see {run}/embed/test/failed)",
        "index      28 vectors in Flat, 0.0 MiB  recall@10 0.988",
        "cluster    28 samples in 5 clusters: ACC 0.943  NMI 0.902  ARI 0.889  silhouette 0.314",
        "anomaly    28 samples scored against 28: AUROC 0.731  average precision 0.413",
        "",
        "features         ACC         NMI         ARI  silhouette",
        "hog            0.600       0.902       0.889       0.314",
        "pixels         0.500       0.902       0.889       0.314",
        "this run       0.943       0.902       0.889       0.314",
        "",
        f"report     {run}/report/index.html",
        f"""next       sslscale search {run} --key '<script>alert('"'"'1'"'"')</script>'""",
    ]


def test_labels_that_are_none_are_told(make_run):
    made = make_run()
    results = made.results()["embed"]
    results["test"]["bad_labels"] = 7
    lines = summary_lines(made.config, {"embed": results})
    assert "without a label" not in lines[0]
    assert lines[1].endswith("(7 samples without a label: the .cls is no 64-bit integer)")


def test_without_labels_and_without_an_index(make_run):
    made = make_run(labelled=False)
    results = made.results()
    (made.run.path / "index" / "main" / "result.json").unlink()
    assert summary_lines(made.config, {"anomaly": results["anomaly"]}) == [
        "anomaly    28 samples scored against 28",
        f"next       sslscale report --run {made.run.path}",
    ]
    assert summary_lines(made.config, {"baselines": results["baselines"]})[1:] == [
        "features         ACC         NMI         ARI  silhouette",
        "hog                -           -           -       0.314",
        "pixels             -           -           -       0.314",
    ]
    report = {"report": {"path": "index.html"}}
    assert summary_lines(made.config, report) == ["", "report     index.html"]


def test_features_that_are_being_made_again_end_no_command(make_run):
    made = make_run()
    for dataset in ("train", "test"):
        (made.run.path / "embed" / dataset / "features.json").unlink()
    assert summary_lines(made.config, {"report": {"path": "index.html"}}) == ["", "report     index.html"]


def test_each_command_names_the_one_after_it(make_run):
    made = make_run()
    results = made.results()
    for stage, after in {"pretrain": "embed", "embed": "index", "cluster": "report"}.items():
        last = summary_lines(made.config, {stage: results[stage]})[-1]
        assert last == f"next       sslscale {after} --run {made.run.path}"
    assert "sslscale search" in summary_lines(made.config, {"index": results["index"]})[-1]


def test_it_imports_nothing_heavy():
    code = "import sys, sslscale.report.summary; print({'torch', 'ray', 'faiss', 'pyarrow'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
