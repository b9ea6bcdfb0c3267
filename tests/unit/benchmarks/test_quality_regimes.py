"""The table of the three regimes: what a row depends on, where its run lies, and what is compared with what."""

import numpy as np
import pytest
import quality_regimes
import regimes_table
from scipy.stats import t as student
from sittings import RunFailed, Runs


def test_rows_that_go_on_from_start_depend_on_its_recipe(monkeypatch):
    before = quality_regimes.rows_of("digits")
    plain = quality_regimes.recipe_hash
    monkeypatch.setattr(
        quality_regimes, "recipe_hash", lambda path, *more: plain(path, *more, path.stem == "simclr" and "changed")
    )
    after = quality_regimes.rows_of("digits")
    # every hash has changed by the `False`; only what follows start may change by the word too
    monkeypatch.setattr(quality_regimes, "recipe_hash", lambda path, *more: plain(path, *more, False))
    unchanged = quality_regimes.rows_of("digits")
    changed = {name for name in before if after[name].digest != unchanged[name].digest}
    assert changed == {"start"} | {name for name, row in before.items() if row.follows_start}
    assert {"joint_scan", "iic", "experts", "experts_init"} <= changed
    assert not changed & {"alone", "pixels", "hog"}


def test_another_recipe_has_another_folder(tmp_path):
    rows, trial = (quality_regimes.rows_of("digits", more) for more in ([], ["pretrain.epochs=1"]))
    folders = {
        quality_regimes.folder_of(tmp_path, name, one[name], 0) for one in (rows, trial) for name in ("start", "iic")
    }
    assert len(folders) == 4


def test_digits_are_halved_and_their_steps_stay():
    digits, fashion = quality_regimes.rows_of("digits"), quality_regimes.rows_of("fashion_mnist")
    config = quality_regimes.load_config(str(digits["iic"].config))
    doubled = quality_regimes.load_config(str(digits["iic"].config), list(digits["iic"].overrides))
    assert doubled.pretrain.epochs == 2 * config.pretrain.epochs
    assert doubled.pretrain.held_out == "test" and doubled.embed.datasets == ["train", "test"]
    assert not any("epochs" in override for override in fashion["iic"].overrides)


def test_the_test_set_of_digits_is_every_second_record(tmp_path):
    config = quality_regimes.rows_of("digits")["start"].config
    overrides = dict(override.split("=", 1) for override in quality_regimes.located(config, tmp_path / "data"))
    train, test = (quality_regimes.open_shards(overrides[f"datasets.{name}"]) for name in ("train", "test"))
    assert (train.num_samples, test.num_samples) == (899, 898)  # 7 shards of 256, one of 5
    keys = [train.open(0).keys[:2], test.open(0).keys[:2]]
    assert keys == [["train-000000", "train-000002"], ["train-000001", "train-000003"]]


def test_seeds_of_each_kind_of_row():
    rows, seeds = quality_regimes.rows_of("digits"), quality_regimes.SEEDS
    by_name = {name: quality_regimes.seeds_of(row, seeds) for name, row in rows.items()}
    five = {name for name, own in by_name.items() if own == [0, 1, 2, 3, 4]}
    assert five == {"start", "alone", "pixels", "hog", "joint_idec", "joint_scan", "joint_temi"}
    assert all(own == [0, 1, 2] for name, own in by_name.items() if name not in five)


def test_a_later_sitting_with_other_seeds_makes_no_more_of_c():
    rows = quality_regimes.rows_of("digits")
    assert quality_regimes.seeds_of(rows["iic"], [3, 4]) == []
    assert quality_regimes.seeds_of(rows["joint_scan"], [3, 4]) == [3, 4]


def test_a_run_in_a_kept_folder_can_go_on_and_starts_from_the_folder_of_its_start(monkeypatch, tmp_path):
    given = {}

    def run_verb(verb, config, run, overrides):
        given.update(override.split("=", 1) for override in overrides)
        measures = dict.fromkeys(("acc", "nmi", "ari", "silhouette"), 0.5)
        trained = {"measures": {"rankme": 9.0}, "seconds": 60.0, "epochs": 2.0}
        return {"cluster": {"measures": measures, "datasets": {"train": {"measures": measures}}}, "pretrain": trained}

    monkeypatch.setattr(quality_regimes, "run_verb", run_verb)
    monkeypatch.setattr(quality_regimes, "located", lambda config, data: ["pack=null"])
    monkeypatch.setattr(quality_regimes, "test_row", lambda run: {"test_nmi": 0.4})
    (tmp_path / "start" / "pretrain").mkdir(parents=True)
    (tmp_path / "start" / "pretrain" / "result.json").write_text('{"seconds": 50.0}')
    rows = quality_regimes.rows_of("digits")
    found = quality_regimes.measure(rows["iic"], 3, tmp_path, tmp_path / "run", tmp_path / "start")
    assert (found["nmi"], found["test_nmi"], found["seconds"], found["rankme"]) == (0.5, 0.4, 60.0, 9.0)
    assert found["start_seconds"] == 50.0
    assert given["seed"] == "3" and given["pretrain.init_from"] == str(tmp_path / "start")
    assert int(given["pretrain.checkpoint_every"]) <= 200 and int(given["pretrain.collapse.evaluations"]) > 1000
    given.clear()
    found = quality_regimes.measure(rows["pixels"], 3, tmp_path, None, None)
    assert "seconds" not in found and given["embed.backbone"] == "pixels"
    assert "pretrain.checkpoint_every" not in given and "pretrain.init_from" not in given


def test_experts_come_with_their_initialisation():
    rows = quality_regimes.rows_of("digits")
    assert quality_regimes.wanted_rows(rows, ["experts"]) == ["experts", "experts_init"]
    assert quality_regimes.wanted_rows(rows, None) == list(rows)
    begun = quality_regimes.load_config(str(rows["experts_init"].config), list(rows["experts_init"].overrides))
    assert begun.pretrain.steps == 1 and begun.pretrain.epochs is None and begun.pretrain.optimizer.lr <= 1e-12
    assert begun.pretrain.objective == quality_regimes.load_config(str(rows["experts"].config)).pretrain.objective


@pytest.fixture
def measured(monkeypatch):
    """The names and start folders of the runs that were made, none of which takes time; those in `fails` fail."""
    made, fails = [], set()

    def measure(row, seed, data, run, start):
        name = "start" if run is None else run.name.split("-")[0]
        made.append((name, seed, start))
        if name in fails:
            raise RunFailed("exit 1: why")
        if run is not None:
            (run / "pretrain" / "backbone").mkdir(parents=True)
        return {"acc": 0.5}

    monkeypatch.setattr(quality_regimes, "measure", measure)
    return made, fails


def test_a_start_that_failed_holds_its_own_seed_up_and_nothing_else(measured, tmp_path, capsys):
    (made, fails), rows, runs = measured, quality_regimes.rows_of("digits"), Runs(None)
    fails.add("start")
    quality_regimes.make_rows("digits", rows, ["start", "alone", "iic"], [0], tmp_path, runs)
    assert [name for name, *_ in made] == ["start", "alone"]
    assert "iic of seed 0 waits" in capsys.readouterr().err
    fails.clear()
    quality_regimes.make_rows("digits", rows, ["start", "alone", "iic"], [0], tmp_path, runs)
    start = quality_regimes.folder_of(tmp_path, "start", rows["start"], 0)
    assert made[2:] == [("start", 0, None), ("iic", 0, start)]


def test_a_start_whose_folder_is_lost_is_made_again_where_something_follows_it(measured, tmp_path):
    (made, _), rows, runs = measured, quality_regimes.rows_of("digits"), Runs(None)
    quality_regimes.make_rows("digits", rows, ["start", "iic"], [0], tmp_path / "first", runs)
    quality_regimes.make_rows("digits", rows, ["start", "iic"], [0], tmp_path / "second", runs)
    assert len(made) == 2  # nothing is left to do
    quality_regimes.make_rows("digits", rows, ["start", "iic", "sela"], [0], tmp_path / "second", runs)
    assert [name for name, *_ in made[2:]] == ["start", "sela"]
    assert len([line for line in runs.lines if line["recipe"] == "start"]) == 1


def line(recipe, seed, value, seconds=100.0, **more):
    names = regimes_table.AGAINST_LABELS
    clusters = "".join(map(str, np.random.default_rng(seed).integers(0, 3, 60)))
    key = {"dataset": "digits", "recipe": recipe, "seed": seed}
    return {**key, **dict.fromkeys(names, value), "seconds": seconds, "clusters": clusters, "silhouette": 0.1, **more}


def bits(saved, collapsed=0.0):
    return {"bits_saved": saved, "bits_saved_low": saved - 0.1, "bits_saved_high": saved + 0.1, "collapsed": collapsed}


@pytest.fixture
def rows():
    lines = [line("start", seed, 0.5, 60.0) for seed in range(3)]
    lines += [line("alone", seed, 0.6) for seed in range(3)]
    lines += [line("joint_scan", seed, 0.6 + 0.1 * (seed + 1), 80.0) for seed in range(3)]
    lines += [line("experts", seed, 0.7, 20.0, start_seconds=50.0, **bits(0.3, float(seed == 2))) for seed in range(2)]
    lines += [line("experts_init", seed, 0.4, 1.0, **bits(9.0)) for seed in range(3)]
    lines += [{**line("pixels", 0, 0.3), "seconds": None}]
    followers = {"joint_scan", "experts", "experts_init"}
    found = regimes_table.table(lines, "digits", followers, {"experts": "experts_init"})
    return {row["recipe"]: row for row in found}


def test_seconds_are_those_of_both_halves(rows):
    assert rows["joint_scan"]["seconds"] == 80 and rows["joint_scan"]["total_seconds"] == 140
    assert rows["experts"]["total_seconds"] == 70  # its start was another one, lost since
    assert rows["joint_scan"]["budget_share"] == pytest.approx(140 / 120)
    assert rows["alone"]["total_seconds"] == rows["alone"]["seconds"] == 100
    assert rows["pixels"]["total_seconds"] is None and rows["pixels"]["budget_share"] is None


def test_differences_are_paired_by_seed_and_corrected_for_the_number_of_rows(rows):
    difference = rows["joint_scan"]["test_nmi_above_alone"]
    scale = 0.1 / 3**0.5
    assert difference["mean"] == pytest.approx(0.2) and difference["n"] == 3
    assert difference["half"] == pytest.approx(student.ppf(0.975, 2) * scale)
    # two rows go on from start; the initialisation of one of them is no row of its own
    assert difference["corrected_half"] == pytest.approx(student.ppf(1 - 0.025 / 2, 2) * scale)
    assert rows["joint_scan"]["nmi_above_start"]["mean"] == pytest.approx(0.3)
    assert rows["experts"]["nmi_above_start"] is None  # theirs was another one
    assert rows["pixels"]["nmi_above_alone"]["half"] is None


def test_experts_are_compared_with_where_they_began(rows):
    for column in ("nmi", "test_nmi"):
        assert rows["experts"][f"{column}_above_initial"]["mean"] == pytest.approx(0.3)
    assert "nmi_above_initial" not in rows["joint_scan"]
    assert rows["experts"]["bits_saved"]["mean"] == pytest.approx(0.3)
    assert (rows["experts"]["bits_saved_low"], rows["experts"]["bits_saved_high"]) == pytest.approx((0.2, 0.4))
    assert rows["experts"]["collapsed"] == 0 and rows["joint_scan"]["collapsed"] is None
    assert rows["experts_init"]["bits_saved"] is None  # of a single expert that was not trained


def test_agreement_of_seeds_is_the_mean_ami_of_their_pairs(rows):
    same = [{"clusters": "001122"}, {"clusters": "220011"}]
    assert regimes_table.seed_agreement(same) == pytest.approx(1.0)
    assert abs(rows["joint_scan"]["seed_agreement"]) < 0.2 and rows["pixels"]["seed_agreement"] is None


def test_what_is_printed(rows, capsys):
    regimes_table.show(list(rows.values()))
    out = capsys.readouterr().out
    assert "OVER BUDGET" in out and "seed_agreement" in out and "Bonferroni" in out
    assert "primary: digits joint_scan test_nmi_above_alone 0.200 ±0.248" in out


def test_test_images_take_the_clusters_of_the_run_or_the_nearest_centroid(tmp_path):
    from sslscale.features import FeatureStore

    folder = tmp_path / "cluster" / "main"
    rows = np.array([[0.0, 0.0], [1.0, 1.0], [0.1, 0.0], [0.9, 1.0]])
    store = FeatureStore.create(tmp_path / "embed" / "test", dim=2, dtype="fp32", normalized=False, backbone="b")
    record = store.write_part(0, rows, list("abcd"), ["s"] * 4, range(4), labels=[0, 1, 0, 1])
    store.commit([record])
    folder.mkdir(parents=True)
    np.save(folder / "centroids.npy", np.array([[1.0, 1.0], [0.0, 0.0]], np.float32))
    found = quality_regimes.test_row(tmp_path)
    assert found["test_acc"] == 1.0 and found["clusters"] == "1010"
    (folder / "assignments" / "test").mkdir(parents=True)
    np.save(folder / "assignments" / "test" / "part-00000.npy", np.zeros(4, np.int32))
    assert quality_regimes.test_row(tmp_path)["test_acc"] == 0.5
