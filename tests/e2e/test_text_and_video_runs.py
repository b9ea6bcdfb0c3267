"""Text and video through the same line: the shipped configs, cut down, and what of a corpus cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tars import encode_sound, write_tar

from sslscale.config import EmbedConfig, FramesConfig, RunConfig, TextConfig
from sslscale.embed.stage import run_embed
from sslscale.models.export import build_backbone, export_backbone
from sslscale.models.text import TextBackbone
from sslscale.rundir import RunDir, read_json
from sslscale.runtime.base import make_runtime
from sslscale.shards.sources.moving_digits import MovingDigits, encode_mp4

ROOT = Path(__file__).parents[2]
KINDS = {
    5: "a small animal that lives in the {}",
    20: "a tall plant that grows in the {}",
    28: "the time spent in a {}",
}
PLACES = ["forest", "desert", "sea", "river", "mountain", "garden", "house", "city", "field", "cave", "swamp", "valley"]
SHORT = (
    *("--runtime", "local", "pretrain.num_workers=1", "pretrain.epochs=null", "pretrain.steps=6"),
    *("pretrain.global_batch=32", "pretrain.evaluate_samples=32", "pretrain.log_every=1", "report.exemplars=3"),
)


def nouns(folder: Path, count: int) -> Path:
    """A file in the format of WordNet's data.noun."""
    lines = []
    for number in range(count):
        kind = list(KINDS)[number % 3]
        gloss = KINDS[kind].format(PLACES[number % 12]) + f'; "number {number}"'
        lines.append(f"{number:08d} {kind:02d} n 01 noun 0 000 | {gloss}  \n")
    (folder / "data.noun").write_text("".join(lines))
    return folder / "data.noun"


def run(cli, folder: Path, config: str, *more: str) -> Path:
    shared = (f"pack.output={folder / 'data'}", f"datasets.train={folder / 'data' / 'train'}")
    done = cli("run", "-c", ROOT / "configs" / config, "--run", folder / "run", "--json", *SHORT, *shared, *more)
    assert done.code == 0, done.err
    assert done.result["embed"]["train"]["failed"] == 0
    return folder / "run"


def test_text_from_a_corpus_to_a_report(cli, tmp_path):
    made = run(
        cli,
        tmp_path,
        "text_quickstart.yaml",
        *(
            f"pack.path={nouns(tmp_path, 300)}",
            "pack.options={}",
            "pretrain.backbone.vocab_size=400",
            "cluster.num_clusters=3",
        ),
    )
    result = read_json(made / "cluster" / "main" / "result.json")
    assert result["num_samples"] == 300 and result["measures"]["nmi"] is not None
    page = (made / "report" / "index.html").read_text()
    assert page.count('<q class="snippet"') >= 9 and "that lives in the" in page and "data:image" not in page
    assert (made / "pretrain" / "backbone" / "tokenizer.json").is_file()
    found = cli("search", made, "--key", "train-000003", "--k", 3, "--json")
    assert found.code == 0 and len(found.result) == 3


def test_video_from_clips_to_a_report(cli, tmp_path):
    made = run(
        cli,
        tmp_path,
        "video_quickstart.yaml",
        f"datasets.test={tmp_path / 'data' / 'test'}",
        "pack.options={clips: 80, label: motion}",
    )
    result = read_json(made / "cluster" / "main" / "result.json")
    assert result["num_samples"] == 20 and result["measures"]["nmi"] is not None
    assert (made / "baselines" / "mean_frame" / "cluster" / "main" / "result.json").is_file()
    page = (made / "report" / "index.html").read_text()
    assert page.count('<img src="data:image') >= 9


def embedded(folder: Path, backbone: Path, members: list[tuple[str, bytes]]) -> dict[str, str]:
    """key -> why it failed; everything else gave a feature."""
    write_tar(folder / "shards" / "a.tar", members)
    config = RunConfig(
        datasets={"train": str(folder / "shards")},
        embed=EmbedConfig(backbone=str(backbone), max_failed_share=1.0, batch_size=4),
    )
    with RunDir(folder / "run") as held:
        result = run_embed(held, config, make_runtime("local"))["train"]
    (failed,) = (folder / "run" / "embed" / "train" / "failed").glob("*.jsonl")
    reasons = {line["key"]: line["reason"] for line in map(json.loads, failed.read_text().splitlines())}
    assert result["failed"] == len(reasons) and result["features_out"] == len(members) - len(reasons)
    return reasons


def test_texts_that_cannot_be_read_are_counted_and_a_huge_one_is_cut(tmp_path):
    config = TextConfig(
        kwargs={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        vocab_size=300,
        max_length=16,
    )
    (tmp_path / "files").mkdir()
    TextBackbone.fit(config, lambda limit: [{"txt": b"the word of the day"}], tmp_path / "files")
    backbone = build_backbone(config, tmp_path / "files")
    export_backbone(backbone, backbone.model.state_dict(), tmp_path / "backbone", size=16)
    members = [
        ("good.txt", b"the word"),
        ("latin.txt", b"the caf\xe9"),
        ("empty.txt", b""),
        ("huge.txt", b"the day " * 1_250_000),
        ("picture.png", b"no text"),
    ]
    assert embedded(tmp_path, tmp_path / "backbone", members) == {
        "latin": "the .txt is not UTF-8: byte 7 is 0xe9",
        "empty": "the .txt is empty",
        "picture": "no text among the members: png",
    }


def test_clips_that_cannot_be_read_are_counted_and_a_short_one_is_not(tmp_path):
    torch.manual_seed(0)
    config = FramesConfig(
        kwargs={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "stem_type": "deep", "stem_width": 4},
        channels=1,
        frames=4,
    )
    backbone = build_backbone(config)
    export_backbone(backbone, backbone.model.state_dict(), tmp_path / "backbone", size=32)
    source = MovingDigits(clips=4)
    clip, frames = source.example("train", 0).data, source.clip("train", 0)[0]
    tail = bytearray(clip)
    tail[-len(clip) // 4 :] = bytes(len(clip) // 4)
    members = [
        ("good.mp4", clip),
        ("short.mp4", encode_mp4(frames[:2])),
        ("tail.mp4", bytes(tail)),
        ("cut.mp4", clip[: len(clip) * 3 // 4]),
        ("sound.mp4", encode_sound()),
    ]
    reasons = embedded(tmp_path, tmp_path / "backbone", members)
    assert reasons.keys() == {"tail", "cut", "sound"}
    assert reasons["sound"] == "the .mp4 has no video"
    assert all(reason.startswith("the .mp4 ") for reason in reasons.values())
