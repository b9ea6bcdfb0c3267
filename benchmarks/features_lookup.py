"""Look-up of keys in a feature store of many rows: each key by itself, after opening.

    python benchmarks/features_lookup.py [--rows 10000000] [--keys 10000]

The store is synthetic: parts of 2^18 rows, 4 dimensions, keys of 21 characters. Opening is opening and a first look-up.
Beside it: an unknown key, a key by its row id, and the read of one 4 KB page, which no look-up can do without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result

from sslscale.features import FeatureSet, FeatureStore

PART_ROWS = 2**18


def key(number: int) -> str:
    return f"shard-{number >> 12:06d}/{number:08d}"


def make_store(path: Path, rows: int) -> None:
    store = FeatureStore.create(path, dim=4, dtype="fp16", normalized=False, backbone="synthetic")
    records = []
    for part, start in enumerate(range(0, rows, PART_ROWS)):
        numbers = range(start, min(start + PART_ROWS, rows))
        features = np.random.default_rng(part).normal(size=(len(numbers), 4))
        shards = [f"{number >> 12:06d}.tar" for number in numbers]
        records.append(store.write_part(part, features, [key(number) for number in numbers], shards, list(numbers)))
    store.commit(records)


def milliseconds(call: Callable[[Any], Any], arguments: list[Any]) -> np.ndarray:
    taken = []
    for argument in arguments:
        start = time.perf_counter()
        call(argument)
        taken.append(1e3 * (time.perf_counter() - start))
    return np.array(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--folder", help="where the store is made; default: a temporary folder")
    arguments = parser.parse_args()
    numbers = np.random.default_rng(0).choice(arguments.rows, arguments.keys, replace=False).tolist()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_store(Path(folder), arguments.rows)
        start = time.perf_counter()
        store = FeatureStore.open(folder)
        found = store.lookup([key(numbers[0])])
        opening = time.perf_counter() - start
        features = FeatureSet({"train": store})
        kept = []
        by_key = milliseconds(lambda number: kept.append(features.lookup(key(number))), numbers)
        assert int(found[0]) == kept[0]
        expected = [number // PART_ROWS << 32 | number % PART_ROWS for number in numbers]
        assert kept == expected, "a look-up gave another row"
        unknown = milliseconds(lambda number: store.find(key(number) + "x"), numbers)
        by_row = milliseconds(store.key_of, kept[:1000])
        ids = Path(folder, "ids.npy")
        with ids.open("rb", buffering=0) as file:
            pages = milliseconds(lambda at: (file.seek(at << 12), file.read(4096)), [n % 1000 for n in numbers])
        result = {
            "what": "milliseconds of one look-up by key, warm, after opening",
            "settings": vars(arguments),
            "opening_seconds": opening,
            "look_up_ms": {"median": float(np.median(by_key)), "p99": float(np.percentile(by_key, 99))},
            "unknown_key_ms": {"median": float(np.median(unknown))},
            "key_of_row_ms": {"median": float(np.median(by_row))},
            "page_read_ms": {"median": float(np.median(pages))},
            "table_bytes": ids.stat().st_size,
            "required": {"look_up_ms": 1.0, "opening_seconds": 2.0},
        }
    write_result("features-lookup", result)


if __name__ == "__main__":
    main()
