"""Images in folders: what is a split, a class, a file to take, and what is said of the rest."""

from __future__ import annotations

import os
import shutil

import pytest

from sslscale.errors import StageError, UserError
from sslscale.shards.sources import make_source
from sslscale.shards.sources.imagefolder import ImageFolder


@pytest.fixture
def fill(tmp_path, png):
    """`fill("cat/a.png", "notes.txt")` writes these files, an image each; returns the folder."""

    def write(*files: str) -> str:
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(png(len(file)))
        return str(tmp_path)

    return write


def labels(source: ImageFolder, split: str = "train") -> dict[str, int | None]:
    """Path -> label of a split's samples."""
    examples = [source.example(split, index) for index in range(source.splits[split])]
    return {example.metadata["path"]: example.label for example in examples}


def test_class_folders_are_labels_over_all_splits(fill, png):
    root = fill("train/dog/b.png", "train/cat/a.PNG", "train/cat/.hidden.png", "test/dog/c.png", "test/notes.txt")
    source = make_source("imagefolder", root)
    assert source.splits == {"train": 2, "test": 1}
    example = source.example("test", 0)
    assert (example.data, example.extension, example.label) == (png(len("test/dog/c.png")), "png", 1)
    assert example.metadata == {"path": "dog/c.png", "class": "dog"}
    before = source.fingerprint
    fill("train/cat/z.png")
    assert make_source("imagefolder", root).fingerprint != before


def test_a_flat_folder_has_no_labels(fill):
    root = fill("a.png")
    assert labels(make_source("imagefolder", root)) == {"a.png": None}
    fill("cat/b.png")
    with pytest.raises(UserError, match=r"both in class folders and beside them\n.*cat/b\.png, but a\.png\n  fix:"):
        make_source("imagefolder", root)


@pytest.mark.parametrize("beside", ["boat/a.png", "a.png", "Validation/cat/a.png"])
def test_images_beside_the_splits_are_not_left_out_unsaid(fill, beside):
    root = fill("train/b.png", beside, "labels.csv")
    name = beside.partition("/")[0]
    with pytest.raises(UserError, match=rf"beside the folders of the splits \(train\)\n  got:     {name}\n"):
        make_source("imagefolder", root)


def test_splits_are_named_where_their_names_say_it_not(fill):
    root = fill("Training/cat/a.png", "train/cat/b.png", "boat/c.png")
    named = make_source("imagefolder", root, {"splits": ["Training"]})
    assert named.splits == {"Training": 1}
    none = make_source("imagefolder", root, {"splits": []})
    assert labels(none) == {"Training/cat/a.png": 0, "boat/c.png": 1, "train/cat/b.png": 2}
    for wrong in (["Training", "test"], "train"):
        with pytest.raises(UserError, match="list of folders right under") as caught:
            make_source("imagefolder", root, {"splits": wrong})
        assert caught.value.allowed == "Training, boat, train"


def test_validation_is_a_split_and_unlabeled_one_without_labels(fill):
    source = make_source(
        "imagefolder", fill("train/cat/a.png", "validation/cat/b.png", "unlabeled/0/c.png", "unlabeled/d.png")
    )
    assert source.splits == {"train": 1, "validation": 1, "unlabeled": 2}
    assert labels(source, "unlabeled") == {"0/c.png": None, "d.png": None}
    assert labels(source, "validation") == {"cat/b.png": 0}


def test_files_of_other_formats_are_counted(fill):
    root = fill("train/cat/a.png", "train/cat/b.tif", "train/cat/c.TIF", "train/cat/d.jfif", "train/png", "README.md")
    source = make_source("imagefolder", root)
    assert source.skipped == {"tif": 2, "md": 1, "without extension": 1}
    assert [source.example("train", index).extension for index in range(2)] == ["png", "jpg"]  # .jfif is JPEG


def test_nothing_but_other_formats(fill):
    with pytest.raises(UserError, match=r"no images here\n  got:     .*: 2 tif, 1 gif\n"):
        make_source("imagefolder", fill("cat/a.tif", "cat/b.tif", "cat/c.gif"))


def test_hidden_folders_are_none(fill):
    root = fill(
        "cat/a.png", ".ipynb_checkpoints/b.png", "__MACOSX/cat/._a.png", "__MACOSX/cat/b.png", "cat/.thumbs/c.png"
    )
    assert labels(make_source("imagefolder", root)) == {"cat/a.png": 0}


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_that_it_lies_in_ends(fill, tmp_path, target):
    root = fill("in/cat/a.png", "in/dog/b.png")
    (tmp_path / "in/cat/up").symlink_to(target)
    source = make_source("imagefolder", f"{root}/in")
    assert labels(source) == {"cat/a.png": 0, "dog/b.png": 1}
    assert source.skipped == {"folder linked again": 1}


def test_links_give_each_image_once(fill, tmp_path):
    root = fill("in/dog/b.png", "out/x/c.png", "in/.store/owl/d.png")
    for link, target in {"ant": "dog", "far": "../out", "further": "../out/x", "owl": ".store/owl"}.items():
        (tmp_path / "in" / link).symlink_to(target)
    source = make_source("imagefolder", f"{root}/in")
    # An image is of the class whose folder it lies in, whatever links there; else the link nearest to the root counts.
    assert labels(source) == {"dog/b.png": 0, "further/c.png": 1, "owl/d.png": 2}
    assert source.skipped == {"folder linked again": 2}


@pytest.mark.parametrize("link", ["cat/b.png", "dog"])
def test_a_link_that_leads_nowhere_stops_it_before_it_starts(fill, tmp_path, link):
    root = fill("cat/a.png")
    (tmp_path / link).symlink_to("/not/mounted")
    with pytest.raises(UserError, match=rf"^1 links lead nowhere.*\n  got:     .*/{link}: No such file.*\n  fix:"):
        make_source("imagefolder", root)


def test_many_that_cannot_be_read_are_one_error(fill, monkeypatch):
    root = fill(*(f"cat/{number}.png" for number in range(9)), "dog/a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: "cat" not in str(path))
    with pytest.raises(
        UserError, match=r"^9 links .*\n  got: .*/cat/0\.png: cannot be read, .* and 4 more\n"
    ) as caught:
        make_source("imagefolder", root)
    assert "cat/4.png" in caught.value.got and "cat/5.png" not in caught.value.got


def test_a_folder_that_cannot_be_listed_is_an_error(fill, tmp_path, monkeypatch):
    root, scandir = fill("cat/a.png", "dog/b.png"), os.scandir

    def refuses(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(UserError, match=r"cannot be read\n  got:     .*/dog"):
        make_source("imagefolder", root)


def test_a_file_that_goes_meanwhile_is_named(fill, tmp_path):
    source = make_source("imagefolder", fill("cat/a.png"))
    (tmp_path / "cat/a.png").unlink()
    with pytest.raises(StageError, match=r"one of the images cannot be read\n  got:     .*cat/a\.png: No such file"):
        source.example("train", 0)


def test_other_pixels_of_equal_names_and_sizes_are_other_data(fill, tmp_path):
    root = fill("one/cat/a.png")
    shutil.copytree(f"{root}/one", f"{root}/two")  # keeps the times
    os.utime(tmp_path / "two", (0, 0))  # of no file
    first, second = (make_source("imagefolder", f"{root}/{name}").fingerprint for name in ("one", "two"))
    assert first == second
    os.utime(tmp_path / "two/cat/a.png", (0, 86400))
    later = make_source("imagefolder", f"{root}/two").fingerprint
    size = (tmp_path / "one/cat/a.png").stat().st_size
    assert later != first and later.startswith(f"1 files, {size} bytes, newest of 1970-01-02 00:00:00 UTC, ")
