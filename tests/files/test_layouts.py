"""Layouts that other systems write: the labels they mean, or an error; every file once; what is left out by name."""

import csv
import io
import json
import os
import struct
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import noise, save
from PIL import Image
from pipelines import Script

from midway.gen.core.errors import DataError
from midway.gen.data.check import check
from midway.gen.data.external import read_external
from midway.gen.data.images import ImageData, describe, load_images
from midway.gen.data.pictures import zip_writer
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.files.names import (
    canonical,
    copies_among,
    is_image,
    junk,
    numbered_folders,
    splits_among,
    without_wrapper,
)

Content = Mapping[str, bytes]


def png(number: int) -> bytes:
    """A different image of 4 x 4 pixels for each number."""
    buffer = io.BytesIO()
    Image.fromarray(noise(4, 4, seed=number)).save(buffer, "PNG")
    return buffer.getvalue()


def images(*names: str) -> dict[str, bytes]:
    return {name: png(number) for number, name in enumerate(names)}


def folder_of(path: Path, content: Content) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def zip_of(path: Path, content: Content | Sequence[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content if isinstance(content, Sequence) else content.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return path


def named(data: ImageData) -> list[str]:
    """The class of each image."""
    return [data.classes[label] for label in data.labels.tolist()]


def both(tmp_path: Path, content: Content) -> list[Path]:
    return [folder_of(tmp_path / "set", content), zip_of(tmp_path / "set.zip", content)]


def raises(path: Path, *words: str) -> None:
    """In training, and as a problem of the check; external samples are read by the same rules."""
    with pytest.raises(DataError) as caught:
        load_images(str(path))
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(DataError) as again:
        read_external(path)
    assert again.value.what == caught.value.what
    try:
        problems = [problem.what for problem in check(DataConfig(str(path))).problems]
    except DataError as error:
        problems = [error.what]
    assert caught.value.what in problems


# ---- lists of labels ----

EDM = [f"0000{index // 2}/img0000000{index}.png" for index in range(6)]


def dataset_json(labels: object) -> dict[str, bytes]:
    return {"dataset.json": json.dumps({"labels": labels}).encode()}


@pytest.mark.parametrize("wrapper", ["", "cifar/", "a/b/"])
def test_labels_of_edm(tmp_path: Path, wrapper: str) -> None:
    numbers = [6, 10, 2, 6, 10, 2]
    content = {**images(*EDM), **dataset_json(list(zip(EDM, numbers, strict=True))[::-1]), "LICENSE": b""}
    for path in both(tmp_path, {wrapper + name: data for name, data in content.items()}):
        data = load_images(str(path))
        assert data.classes == ("2", "6", "10") and named(data) == list(map(str, numbers))
        assert data.conversions == (f"6 images: labels of {wrapper}dataset.json",)
        assert data.left_out == ("1 file: no extension (1)",), "the list itself is read"


def test_edm_without_labels_is_one_class(tmp_path: Path) -> None:
    for path in both(tmp_path, {**images(*EDM), **dataset_json(None)}):
        data = load_images(str(path))
        assert data.classes == ("all",) and data.conversions == (
            "6 images: one class, since dataset.json holds no labels",
        )


def test_numbered_folders_without_a_list_are_one_class(tmp_path: Path) -> None:
    for path in both(tmp_path, images(*EDM)):
        data = load_images(str(path))
        assert data.classes == ("all",)
        (note,) = data.conversions
        assert note == "6 images: one class, since the numbered folders (00000, 00001, ...) are no classes"
        assert check(DataConfig(str(path))).conversions == {note.split(": ", 1)[1]: 6}


@pytest.mark.parametrize("conditional", [True, False])
def test_our_own_export_is_read_back(tmp_path: Path, conditional: bool) -> None:
    import torch

    pixels = torch.from_numpy(noise(1200, 1, 4, 4))
    labels = torch.arange(1200) * 7 % 12
    with zip_writer(tmp_path / "out.zip", labels if conditional else None) as writer:
        writer.add(pixels)
    data = load_images(str(tmp_path / "out.zip"))
    assert torch.equal(data.images[:], pixels)
    assert torch.equal(data.labels, labels if conditional else labels * 0)
    assert data.classes == (tuple(map(str, range(12))) if conditional else ("all",))
    assert torch.equal(read_external(tmp_path / "out.zip").pixels, pixels), "in the order of the seeds"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[name, 1] for name in EDM[:5]], ("dataset.json: 5 of 6 images have a label", EDM[5])),
        ([], ("0 of 6 images",)),
        ([[name, [0.5, 1.0]] for name in EDM], ("dataset.json is no list of labels", "a number or a name")),
        ([[name, True] for name in EDM], ("a number or a name",)),
        ([[EDM[0], 1], [EDM[0], 2], *([name, 1] for name in EDM)], ("has the labels 1 and 2",)),
        ([1, 2], ("pairs",)),
        (3, ("dataset.json is no list",)),
    ],
    ids=["some", "none", "vectors", "booleans", "two", "numbers", "a number"],
)
def test_lists_that_give_no_labels_raise(tmp_path: Path, labels: object, words: Sequence[str]) -> None:
    for path in both(tmp_path, {**images(*EDM), **dataset_json(labels)}):
        raises(path, *words)


def test_a_list_that_is_no_json_raises_and_one_of_another_program_does_not_matter(tmp_path: Path) -> None:
    raises(
        folder_of(tmp_path / "cut", {**images("a/0.png"), "dataset.json": b'{"labels": [['}), "dataset.json", "correct"
    )
    raises(folder_of(tmp_path / "deep", {**images("a/0.png"), "dataset.json": b"[" * 100_000}), "dataset.json")
    other = {"dataset.json": b'{"name": "brains"}', "b/metadata.csv": b"id,age\n1,2\n"}
    data = load_images(str(folder_of(tmp_path / "other", {**images("a/0.png", "b/1.png"), **other})))
    assert named(data) == ["a", "b"] and data.left_out == ("2 files: .csv (1), .json (1)",)


def csv_bytes(rows: Sequence[Sequence[object]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode()


HUGGING_FACE = {
    "csv": {"metadata.csv": csv_bytes([("file_name", "label"), ("1.png", "dog"), ("0.png", "cat"), ("2.png", "cat")])},
    "Excel": {
        "metadata.csv": b"\xef\xbb\xbf"
        + csv_bytes(
            [("text", "file_name", "label"), ("a; b", "0.png", "cat"), ("", "1.png", "dog"), ("", "2.png", "cat")], ";"
        )
    },
    "jsonl": {
        "metadata.jsonl": b"\n".join(
            json.dumps({"file_name": f"{number}.png", "label": label}).encode()
            for number, label in enumerate(("cat", "dog", "cat"))
        )
    },
    "upper case": {
        "METADATA.CSV": csv_bytes([("file_name", "label"), *zip(("0.png", "1.png", "2.png"), "cdc", strict=True)])
    },
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_metadata_of_hugging_face(tmp_path: Path, kind: str) -> None:
    for path in both(tmp_path, {**images("0.png", "1.png", "2.png"), **HUGGING_FACE[kind]}):
        data = load_images(str(path))
        assert [name[0] for name in named(data)] == ["c", "d", "c"] and len(data.classes) == 2
        assert "column label" in data.conversions[0] and data.left_out == ()


@pytest.mark.parametrize(
    ("heading", "values"),
    [
        (("file_name", "Label"), ("cat", "dog")),
        (("File Name", "label"), ("cat", "dog")),
        (("filename", " class_name "), ("cat", "dog")),
        (("file_name", "Category"), (" cat", "dog ")),
        (("file_name", "className"), ("cat", "dog")),
    ],
)
def test_headings_vary(tmp_path: Path, heading: tuple[str, str], values: tuple[str, str]) -> None:
    rows = csv_bytes([heading, ("0.png", values[0]), ("1.png", values[1]), ("2.png", "cat")])
    lines = [
        dict(zip(heading, row, strict=True)) for row in (("0.png", values[0]), ("1.png", values[1]), ("2.png", "cat"))
    ]
    listed = "\n".join(map(json.dumps, lines)).encode()
    for name, content in (("metadata.csv", rows), ("metadata.jsonl", listed)):
        path = folder_of(tmp_path / name, {**images("0.png", "1.png", "2.png"), name: content})
        assert named(load_images(str(path))) == ["cat", "dog", "cat"]


def test_several_columns_that_may_be_labels_raise_where_there_are_no_folders(tmp_path: Path) -> None:
    rows = [("file_name", "fine_label", "coarse_label"), ("0.png", "cat", "animal"), ("1.png", "dog", "animal")]
    raises(
        folder_of(tmp_path / "a", {**images("0.png", "1.png"), "metadata.csv": csv_bytes(rows)}),
        "metadata.csv has no column `label`",
        "coarse_label, fine_label may hold the labels",
    )
    folders = {
        **images("cat/0.png", "dog/1.png"),
        "metadata.csv": csv_bytes([("file_name", "label_source"), ("0.png", "Ann")]),
    }
    assert named(load_images(str(folder_of(tmp_path / "b", folders)))) == ["cat", "dog"]


def test_a_label_in_some_lines_raises(tmp_path: Path) -> None:
    lines = [b'{"file_name": "0.png"}', b'{"file_name": "1.png", "label": 2}']
    raises(folder_of(tmp_path, {**images("0.png", "1.png"), "metadata.jsonl": b"\n".join(lines)}), "0.png", "None")


def test_labels_beat_a_list_that_holds_none(tmp_path: Path) -> None:
    rows = csv_bytes([("file_name", "label"), ("0.png", "cat")])
    path = folder_of(tmp_path / "a", {**images("0.png"), **dataset_json(None), "metadata.csv": rows})
    assert named(load_images(str(path))) == ["cat"]
    splits = {**images("train/0.png", "test/0.png"), **dataset_json(None)}
    assert load_images(str(folder_of(tmp_path / "b", splits))).conversions == (
        "2 images: one class, since dataset.json holds no labels",
        "2 images: test, train are read as one set",
    )


def test_a_label_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    rows = csv_bytes([("file_name", "label"), ("0.png", "9" * 5000), ("1.png", 8)])
    assert load_images(str(folder_of(tmp_path, {**images("0.png", "1.png"), "metadata.csv": rows}))).classes[0] == "8"


def test_metadata_beats_folders_and_names_what_it_lists_besides(tmp_path: Path) -> None:
    rows = [
        ("file_name", "label"),
        ("train\\0.png", 3),
        ("./test/1.png", 10),
        ("test/../train/2.png", 3),
        ("gone.png", 1),
    ]
    content = {**images("train/0.png", "test/1.png", "train/2.png"), "metadata.csv": csv_bytes(rows)}
    for path in both(tmp_path, content):
        data = load_images(str(path))
        assert data.classes == ("3", "10") and named(data) == ["10", "3", "3"]
        assert data.conversions == (
            "3 images: labels of metadata.csv, column label, which lists 1 that is not here",
            "3 images: test, train are read as one set",
        )


def test_splits_with_a_list_each_are_still_splits(tmp_path: Path) -> None:
    rows = [("file_name", "label"), ("0.png", "cat"), ("1.png", "dog")]
    content = {**images("train/0.png", "train/1.png", "test/0.png", "test/1.png")}
    content |= {f"{split}/metadata.csv": csv_bytes(rows) for split in ("train", "test")}
    raises(folder_of(tmp_path / "set", content), "test, train look like splits")
    assert load_images(str(tmp_path / "set" / "train")).classes == ("cat", "dog")


def test_metadata_without_labels_leaves_the_folders(tmp_path: Path) -> None:
    captions = csv_bytes([("file_name", "text"), ("a/0.png", "a cat"), ("b/1.png", "a dog")])
    for path in both(tmp_path, {**images("a/0.png", "b/1.png"), "metadata.csv": captions}):
        data = load_images(str(path))
        assert named(data) == ["a", "b"] and data.left_out == ("1 file: .csv (1)",)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("0.png", "cat")], ("1 of 2 images have a label", "1.png is not listed")),
        ([("0.png", "cat"), ("1.png", "")], ("1.png has no label",)),
        ([("0.png", "cat"), ("1.png", "a"), ("1.png", "b")], ("1.png has the labels a and b",)),
        ([("0.png", "cat"), ("1.PNG", "a")], ("1.png is not listed",)),
        ([("0.png", "cat"), ("../1.png", "a")], ("lies outside",)),
    ],
)
def test_metadata_that_does_not_fit_raises(tmp_path: Path, rows: list[tuple[str, str]], words: Sequence[str]) -> None:
    content = {**images("0.png", "1.png"), "metadata.csv": csv_bytes([("file_name", "label"), *rows])}
    for path in both(tmp_path, content):
        raises(path, *words)


def test_two_lists_that_disagree_raise(tmp_path: Path) -> None:
    rows = csv_bytes([("file_name", "label"), ("0.png", 1)])
    content = {**images("0.png"), **dataset_json([["0.png", 1]]), "metadata.csv": rows}
    assert load_images(str(folder_of(tmp_path / "same", content))).classes == ("1",)
    raises(folder_of(tmp_path / "other", {**content, **dataset_json([["0.png", 2]])}), "0.png has the labels 2 and 1")


# ---- folders that are no classes ----

SPLIT_SETS = {
    "Intel": ("seg_train", "seg_test", "seg_pred"),
    "COCO": ("train2017", "val2017"),
    "images": ("train_images", "test_images"),
    "Kaggle": ("training_set", "test_set"),
    "Fruits-360": ("Training", "Test", "test-multiple_fruits"),
    "CycleGAN": ("trainA", "trainB", "testA"),
    "camel case": ("TrainSet", "ValSet"),
    "prefix": ("asl_alphabet_train", "asl_alphabet_test"),
    "Market": ("bounding_box_train", "bounding_box_test"),
    "held out": ("train", "held-out"),
    "held_out_set": ("images", "held_out_set"),
    "beside classes": ("train", "cat", "dog"),
    "upper case": ("TRAIN", "VALID"),
    "unlabelled": ("train_images", "unlabeled_images"),
    "evaluation": ("dev", "eval"),
    "validation": ("cat", "dog", "validation"),
    "one word": ("trainset", "testset"),
    "one word of images": ("traindata", "valimages"),
    "each of another word": ("train_new", "valid"),
    "STL-10": ("labeled_images", "unlabeled_images"),
    "semi-supervised": ("labeled", "unlabeled"),
    "batches": ("data_batch_1", "data_batch_2", "test_batch"),
    "re-identification": ("query", "gallery"),
    "German": ("Trainingsdaten", "Testdaten"),
    "Chinese": ("训练集", "测试集"),
}


@pytest.mark.parametrize("kind", SPLIT_SETS)
@pytest.mark.parametrize("wrapper", ["", "set/"])
def test_splits_by_any_name_raise(tmp_path: Path, kind: str, wrapper: str) -> None:
    names = [f"{wrapper}{folder}/cat/{number}.png" for folder in SPLIT_SETS[kind] for number in range(2)]
    flat = [f"{wrapper}{folder}/{number}.png" for folder in SPLIT_SETS[kind] for number in range(2)]
    raises(folder_of(tmp_path / "nested", images(*names)), "split", "give the path of one")
    raises(zip_of(tmp_path / "flat.zip", images(*flat)), "split", "give the path of one")


@pytest.mark.parametrize(
    "classes",
    [
        ("trainer", "valley", "test tube"),
        ("contest", "latest", "protest"),
        ("training shoe", "running shoe"),
        ("validator", "developer", "trainee"),
        ("train", "bus", "bicycle"),
        ("valid", "invalid"),
        ("test bench", "test tube"),
        ("retrain", "untested"),
        ("image", "text"),
        ("masks", "no_masks"),
        ("photo", "photocopy"),
        ("photo", "painting"),
        ("small", "large"),
        ("art_gallery", "gallery"),
        ("labeled", "blank"),
        ("A", "a"),
        ("cat~", "dog.bak"),
        ("cat (wild)", "cat"),
        ("00", "01"),
        ("0", "1", "2"),
        ("2021", "2022"),
    ],
)
def test_classes_that_only_look_like_something_else(tmp_path: Path, classes: tuple[str, ...]) -> None:
    for path in both(tmp_path, images(*(f"{name}/{number}.png" for name in classes for number in range(2)))):
        data = load_images(str(path))
        assert data.classes == tuple(sorted(classes)) and data.conversions == ()


def test_a_lone_word_is_a_split_if_it_holds_folders() -> None:
    assert splits_among(("valid", "invalid")) == [] == splits_among(("train", "bus"))
    assert splits_among(("valid", "cat"), {"valid"}) == ["valid"] and splits_among(("train", "bus"), {"train"}) == [
        "train"
    ]
    assert splits_among(("valid", "test", "cat")) == ["test", "valid"]


def test_a_wrapper_ends_where_names_differ_or_a_folder_is_left() -> None:
    def parts(*names: str) -> list[str]:
        return ["/".join(part) for part in without_wrapper(names)]

    assert parts("a/b/c/0.png", "a/b/d/e/1.png") == ["c/0.png", "d/e/1.png"]
    assert parts("a/b/0.png", "a/b/1.png") == ["b/0.png", "b/1.png"] and parts("a/b/c/0.png") == ["c/0.png"]
    assert parts("a/b/0.png", "a/1.png") == ["a/b/0.png", "a/1.png"] and parts("a/b/0.png", "1.png")[1] == "1.png"
    deep = "a/" * 20_000  # in one pass, not one a folder
    assert parts(f"{deep}c/0.png", f"{deep}d/1.png") == ["c/0.png", "d/1.png"] and parts() == []


def test_splits_inside_the_classes_are_noted(tmp_path: Path) -> None:
    data = load_images(str(folder_of(tmp_path, images("cat/train/0.png", "cat/test/1.png", "dog/train/2.png"))))
    assert named(data) == ["cat", "cat", "dog"]
    assert data.conversions == ("3 images: test, train in the class folders are read as one set",)


@pytest.mark.parametrize(
    "names",
    [
        [f"{n // 1000 * 1000:05d}/{n:05d}.png" for n in (0, 999, 1000, 2500)],
        [f"{n // 10_000:05d}/{n:09d}.jpg" for n in (0, 10_000, 20_001)],
        [f"{n % 1000:04d}/{n}.jpg" for n in (1234, 99_777)],
        ["3f/3f2a9c00d1e2f3a4.png", "a0/a0b1c2d3e4f50617.png"],
        ["3/f/3f2a9c00d1e2f3a4.png", "a/0/a0b1c2d3e4f50617.png"],
        ["100CANON/IMG_0001.JPG", "101CANON/IMG_0001.JPG"],
        ["images_001/images/0.png", "images_002/images/1.png"],
        ["part1/a.png", "part2/b.png"],
        ["HAM10000_images_part_1/ISIC_0024306.jpg", "HAM10000_images_part_2/ISIC_0029306.jpg"],
        ["fold1/a.png", "fold2/b.png"],
    ],
    ids=[
        "FFHQ",
        "img2dataset",
        "Danbooru",
        "hashes",
        "hashes in two levels",
        "camera",
        "NIH",
        "parts",
        "HAM10000",
        "folds",
    ],
)
def test_folders_that_only_divide_files_are_no_classes(names: list[str]) -> None:
    assert numbered_folders(names) is not None


@pytest.mark.parametrize(
    "names",
    [
        ["0001/0001.png", "0002/0002.png"],
        ["00/0.png", "01/100.png"],
        ["2021/0001.png", "2022/0001.png"],
        ["n01440764/n01440764_10026.JPEG", "n01443537/n01443537_1.JPEG"],
        ["a/a1.png", "b/b1.png"],
        ["group1/0.png", "group2/0.png"],
        ["part1/cat/0.png", "part2/dog/0.png"],
        ["cat_part1/0.png", "dog_part1/0.png"],
        ["manifold1/0.png", "manifold2/0.png"],
    ],
)
def test_numbers_and_letters_are_classes_otherwise(names: list[str]) -> None:
    assert numbered_folders(names) is None


@pytest.mark.parametrize(
    "copy",
    [
        *("Copy of cat", "cat - Copy", "cat - Copy (2)", "cat copy", "cat copy 2", "cat (1)", "Cat - Kopie"),
        *("cat_backup", "cat.bak", "cat~", "cat - Cópia", "cat - コピー", "cat (Ann's conflicted copy 2024-01-31)"),
        *("cat (conflicted copy 2024)", "cat - Copy (1)"),
    ],
)
def test_copies_of_a_class_raise(tmp_path: Path, copy: str) -> None:
    raises(folder_of(tmp_path, images("cat/0.png", f"{copy}/0.png", "dog/1.png")), f"{copy} looks like a copy of cat")
    assert copies_among((copy, "dog")) == []


def test_parts_of_classes_raise(tmp_path: Path) -> None:
    raises(
        folder_of(tmp_path, images("part1/cat/0.png", "part1/dog/1.png", "part2/cat/2.png")),
        "look like parts of one set",
    )


@pytest.mark.parametrize(
    "folders", [("fold1", "fold2"), ("X_part_1", "X_part_2"), ("subset_0", "subset_1", "subset_2")]
)
def test_parts_by_other_names_raise(tmp_path: Path, folders: tuple[str, ...]) -> None:
    names = [f"{folder}/{name}/0.png" for folder in folders for name in ("cat", "dog")]
    raises(folder_of(tmp_path, images(*names)), "look like parts of one set")


@pytest.mark.parametrize(
    "folders",
    [
        ("images", "resized"),
        ("Original Images", "Augmented Images"),
        ("images", "images2"),
        ("img", "img_small", "thumbs"),
    ],
)
def test_versions_of_one_set_raise(tmp_path: Path, folders: tuple[str, ...]) -> None:
    raises(
        folder_of(tmp_path, images(*(f"{folder}/0.png" for folder in folders))), "versions of one set", "path of one"
    )


@pytest.mark.parametrize("outer", ["cell_images", "all", "dog2"])
def test_a_copy_of_the_set_inside_it_raises(tmp_path: Path, outer: str) -> None:
    """As archives that were packed twice have it."""
    names = [
        f"set/{below}{name}/{number}.png" for below in ("", f"{outer}/") for name in ("cat", "dog") for number in "01"
    ]
    for path in both(tmp_path, images(*names)):
        raises(path, f"the folder {outer} holds folders that are called like the classes")
    assert load_images(
        str(folder_of(tmp_path / "less", images("cat/0.png", "dog/0.png", "all/cat/1.png")))
    ).classes == (*("all", "cat", "dog"),)


def test_folders_that_recur_in_the_classes_are_noted(tmp_path: Path) -> None:
    """Which of the two levels is the label, the layout does not show."""
    sites = [f"{site}/{name}/0.png" for site in ("north", "south") for name in ("cat", "dog")]
    data = load_images(str(folder_of(tmp_path / "a", images(*sites))))
    assert named(data) == ["north", "north", "south", "south"]
    assert data.conversions == ("4 images: cat, dog in the class folders are read as one set",)
    data = load_images(str(folder_of(tmp_path / "b", images("cat/2023/0.png", "dog/2024/0.png"))))
    assert data.conversions == ()


def test_classes_that_only_windows_takes_for_one(tmp_path: Path) -> None:
    for number, folders in enumerate((("cat", "cat "), ("cat", "cat."))):
        names = [f"{folder}/0.png" for folder in (*folders, "dog")]
        raises(zip_of(tmp_path / f"{number}.zip", images(*names)), "differ in a space or dot at the end", "into one")
    cards = images("Cardigan/0.png", "cardigan/1.png", "dog/2.png")
    for path in both(tmp_path, cards):
        data = load_images(str(path))
        assert named(data) == ["Cardigan", "cardigan", "dog"]
        assert data.conversions == ("3 images: Cardigan and cardigan are classes, which differ in case alone",)


def test_parquet_raises(tmp_path: Path) -> None:
    raises(folder_of(tmp_path, {**images("0.png"), "metadata.parquet": b"PAR1\xff"}), "Parquet", "metadata.csv")


def test_masks_beside_images_raise(tmp_path: Path) -> None:
    raises(folder_of(tmp_path / "a", images("images/0.png", "masks/0.png")), "masks look like annotations")
    raises(folder_of(tmp_path / "b", images("JPEGImages/0.png", "SegmentationClass/0.png")), "annotations")


def test_a_library_of_photos_raises(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "Photos.photoslibrary", images("originals/0/0.png", "resources/derivatives/0.png"))
    raises(path, "library of photo software", "export")


# ---- names of other systems ----


def test_backslashes_are_folders(tmp_path: Path) -> None:
    content = images("cat\\0.png", "cat\\old\\1.png", "dog\\2.png")
    zipped = zip_of(tmp_path / "a.zip", [("cat\\", b""), *content.items()])
    (tmp_path / "flat").mkdir()
    for name, data in content.items():  # what unzip of other systems leaves here
        (tmp_path / "flat" / name).write_bytes(data)
    plain = load_images(
        str(folder_of(tmp_path / "plain", {name.replace("\\", "/"): data for name, data in content.items()}))
    )
    for path in (zipped, tmp_path / "flat"):
        data = load_images(str(path))
        assert named(data) == ["cat", "cat", "dog"] and data.fingerprint == plain.fingerprint


def test_a_backslash_is_a_letter_where_folders_are(tmp_path: Path) -> None:
    content = images("cat\\.png/0.png", "cat\\.png/we\\ird\\.png", "cat/1.png")
    for path in both(tmp_path, content):
        assert named(load_images(str(path))) == ["cat", "cat\\.png", "cat\\.png"]
    raises(folder_of(tmp_path / "mixed", images("cat\\0.png", "1.png")), "beside the class folders", "1.png")
    assert named(load_images(str(zip_of(tmp_path / "mixed.zip", images("cat\\0.png", "dog/1.png"))))) == ["cat", "dog"]


def test_names_in_both_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    content = images(f"{composed}/0.png", f"{apart}/1.png", "Cafz/2.png")
    plain = load_images(
        str(folder_of(tmp_path / "plain", {unicodedata.normalize("NFC", k): v for k, v in content.items()}))
    )
    for path in both(tmp_path, content):
        data = load_images(str(path))
        assert data.classes == ("Cafz", composed) and data.fingerprint == plain.fingerprint
    raises(folder_of(tmp_path / "twice", images(f"a/{composed}.png", f"a/{apart}.png")), "have one name")
    listed = {**images(f"{apart}.png"), **dataset_json([[f"{composed}.png", 4]])}
    assert load_images(str(folder_of(tmp_path / "listed", listed))).classes == ("4",)


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_names_that_are_not_marked_as_utf8(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        zipfile.ZipInfo, "_encodeFilenameFlags", lambda self: (self.filename.encode(encoding), self.flag_bits)
    )
    path = zip_of(tmp_path / "a.zip", images("Café/0.png", "dog/1.png"))
    assert "Café".encode(encoding) in path.read_bytes()
    assert load_images(str(path)).classes == ("Café", "dog")


def test_absolute_names_are_relative_and_those_outside_raise(tmp_path: Path) -> None:
    for number, prefix in enumerate(("/home/me/", "C:\\data\\", "./", "//server/share/")):
        between = "\\" if "\\" in prefix else "/"
        content = images(f"{prefix}cat{between}0.png", f"{prefix}dog{between}1.png")
        assert named(load_images(str(zip_of(tmp_path / f"{number}.zip", content)))) == ["cat", "dog"]
    raises(zip_of(tmp_path / "up.zip", images("cat/0.png", "../dog/1.png")), "lies outside", "..")
    raises(zip_of(tmp_path / "win.zip", images("cat/0.png", "..\\dog\\1.png")), "lies outside")
    assert canonical("cat/../dog/1.png") == "dog/1.png" and canonical("a.b/c d.png") == "a.b/c d.png"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name(tmp_path: Path) -> None:
    same = zip_of(tmp_path / "same.zip", [("cat/0.png", png(0)), ("dog/1.png", png(1)), ("cat/0.png", png(0))])
    assert named(load_images(str(same))) == ["cat", "dog"]
    assert load_images(str(same)).left_out == ("1 file: read by another name (1)",)
    raises(zip_of(tmp_path / "a.zip", [("cat/0.png", png(0)), ("cat/0.png", png(1))]), "one name", "rename or remove")
    raises(zip_of(tmp_path / "b.zip", [("cat/0.png", png(0)), ("cat\\0.png", png(1))]), "one name")


def test_encrypted_and_strangely_compressed_zips(tmp_path: Path) -> None:
    for field, value, words in ((8, 1, "is encrypted"), (10, 9, "compressed in a way")):
        path = zip_of(tmp_path / f"{value}.zip", images("cat/0.png", "dog/1.png"))
        data = bytearray(path.read_bytes())
        for signature, offset in ((b"PK\x01\x02", field), (b"PK\x03\x04", field - 2)):
            at = data.find(signature)
            while at >= 0:
                data[at + offset : at + offset + 2] = struct.pack("<H", value)
                at = data.find(signature, at + 1)
        path.write_bytes(data)
        raises(path, words, "unpack it")


def test_links_in_a_zip_are_not_images(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", images("cat/0.png", "dog/1.png"))
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("dog/2.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "../cat/0.png")
    assert named(load_images(str(path))) == ["cat", "dog"]


# ---- every file once ----


def animals(root: Path) -> Path:
    return folder_of(root, images(*(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(10))))


def same_as_animals(path: Path, tmp_path: Path) -> None:
    """The fingerprint holds labels and order."""
    data, plain = load_images(str(path)), load_images(str(animals(tmp_path / "plain")))
    assert len(data.images) == 20 and data.fingerprint == plain.fingerprint
    assert check(DataConfig(str(path))).fingerprint == data.fingerprint


LINKS = {
    "each other": {"cat/d": "../dog", "dog/c": "../cat"},
    "first by name": {"cat/a": "../dog"},
    "itself": {"cat/self": "."},
    "up": {"cat/up": "..", "dog/root": "../.."},
    "hidden": {".cache": "..", "cat/.up": "../dog"},
    "chain": {"cat/x": "../dog/y", "dog/y": "../cat"},
    "another name": {"kitten": "cat"},
    "a file": {"dog/z.png": "../cat/0.png"},
    "a file of the same class": {"cat/z.png": "0.png"},
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_within_the_folder_add_nothing(tmp_path: Path, kind: str) -> None:
    root = animals(tmp_path / "set")
    for name, target in LINKS[kind].items():
        (root / name).symlink_to(target)
    same_as_animals(root, tmp_path)
    assert ("1 file" if len(LINKS[kind]) == 1 else "2 files") in load_images(str(root)).left_out[0]


def test_classes_may_lie_elsewhere_or_be_hidden(tmp_path: Path) -> None:
    store = animals(tmp_path / "store")
    (tmp_path / "outside").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "outside" / name).symlink_to(store / name)
    (tmp_path / "outside" / ".before").symlink_to(store)  # is left out, and hides nothing
    same_as_animals(tmp_path / "outside", tmp_path)
    hidden = tmp_path / "hidden"
    animals(hidden / ".store")
    for name in ("cat", "dog"):
        (hidden / name).symlink_to(Path(".store") / name)
    same_as_animals(hidden, tmp_path)


@pytest.mark.parametrize("target", ["store", ".", "above", "above/set"])
def test_links_of_another_place_do_not_lead_up(tmp_path: Path, target: str) -> None:
    """Into what holds the link, or the source, where other images are."""
    root, store = animals(tmp_path / "above" / "set"), animals(tmp_path / "store")
    for place in (tmp_path, tmp_path / "above", store):
        folder_of(place, images("emu/0.png"))
    (root / "cat").rename(tmp_path / "old")
    (root / "cat").symlink_to(store / "cat")
    (store / "cat" / "up").symlink_to(tmp_path / target)
    same_as_animals(root, tmp_path)


def test_files_may_be_links_to_a_store(tmp_path: Path) -> None:
    """As git-annex and Hugging Face's cache have them; what is in two classes is in both, as a copy would be."""
    root = tmp_path / "set"
    for number in range(20):
        blob = folder_of(root / ".store", {f"{number:02}": png(number)}) / f"{number:02}"
        link = root / ("cat", "dog")[number // 10] / f"{number % 10}.png"
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    same_as_animals(root, tmp_path)
    (root / "dog" / "z.png").symlink_to("../.store/00")
    (root / "cat" / "z.png").symlink_to("../.store/00")
    assert named(load_images(str(root))).count("dog") == 11 and named(load_images(str(root))).count("cat") == 10


def test_hard_links_are_read_once_a_class(tmp_path: Path) -> None:
    root = animals(tmp_path / "set")
    os.link(root / "cat" / "0.png", root / "cat" / "z.png")
    same_as_animals(root, tmp_path)
    os.link(root / "cat" / "0.png", root / "dog" / "z.png")
    assert named(load_images(str(root))).count("dog") == 11


def test_two_links_to_one_folder_would_be_two_labels(tmp_path: Path) -> None:
    animals(tmp_path / "store")
    root = folder_of(tmp_path / "set", images("emu/0.png"))
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    (root / "pet").symlink_to(tmp_path / "store" / "cat")
    raises(root, "cat and pet are links to one folder", "labels cat and pet")
    (root / "pet").unlink()
    (root / "pet").symlink_to(tmp_path / "store")  # holds what cat leads to
    raises(root, "links to one folder")
    (root / "pet").unlink()
    (root / "cat" / "again").symlink_to(tmp_path / "store" / "cat")
    assert len(load_images(str(root)).images) == 11


def test_a_folder_that_cannot_be_entered_raises_unless_it_is_a_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, look = folder_of(animals(tmp_path / "set"), {"lost+found/1.png": b""}), os.stat
    closed = "lost+found"

    def forbidding(path: str, **options: bool) -> os.stat_result:
        if str(path).endswith(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", forbidding)
    assert len(load_images(str(root)).images) == 20
    closed = "dog"
    raises(root, "dog cannot be listed", "permissions")


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    root = animals(tmp_path / "set")
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    (root / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"2 of 22 images cannot be decoded(.|\n)*gone\.png(.|\n)*loop\.png"):
        load_images(str(root))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    root = animals(tmp_path / "set")
    os.mkfifo(root / "cat" / "pipe.png")
    raises_pipe = r"1 of 21 images(.|\n)*pipe\.png(.|\n)*FIFO"
    with pytest.raises(DataError, match=raises_pipe):
        load_images(str(root))


# ---- what is left out ----

LEFT_OVERS = {
    "@eaDir/cat/SYNOPHOTO_THUMB_M.jpg": "@eaDir",
    "cat/@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg": "@eaDir",
    "__MACOSX/cat/._0.png": "__MACOSX",
    "cat/._0.png": "._*",
    ".DS_Store": ".DS_Store",
    "cat/Thumbs.db": "Thumbs.db",
    "desktop.ini": "desktop.ini",
    "dog/.thumbnails/1.png": ".thumbnails",
    "dog/.@__thumb/1.png": ".@__thumb",
    "$RECYCLE.BIN/1.png": "$RECYCLE.BIN",
    "#recycle/1.png": "#recycle",
    "cat/_vti_cnf/0.png": "_vti_cnf",
    "FOUND.000/1.png": "FOUND.000",
    "Lightroom Catalog Previews.lrdata/0/1.png": "Lightroom Catalog Previews.lrdata",
    "iPhoto Library.photolibrary/Previews/1.png": "iPhoto Library.photolibrary",
    "cat/labels.txt": ".txt",
    "cat/notes.TXT": ".TXT",
    "dog/photo.jxl": ".jxl",
    "LICENSE": "no extension",
}


def test_everything_left_out_is_named_where_training_begins(tmp_path: Path, script: Script) -> None:
    pictures = images(*(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(10)))
    content = {**pictures, **dict.fromkeys(LEFT_OVERS, png(99)), "emu/0.jxl": b"", "emu/1.jxl": b""}
    plain, files, bare = load_images(str(animals(tmp_path / "plain"))), "", ""
    for path in both(tmp_path, content):
        data = load_images(str(path))
        assert data.fingerprint == plain.fingerprint and plain.left_out == ()
        files, bare = data.left_out
        assert files.startswith("21 files: ") and bare == "folders without images: emu"
        facts = check(DataConfig(str(path)))
        counts = {kind: list(LEFT_OVERS.values()).count(kind) + 2 * (kind == ".jxl") for kind in LEFT_OVERS.values()}
        assert facts.other_files == counts and facts.bare_folders == ("emu",)
        assert {f"left out: {line}" for line in data.left_out} <= set(facts.warnings)
        listed = [f"{kind} ({count})" for kind, count in sorted(counts.items(), key=lambda item: -item[1])[:12]]
        assert all(words in files for words in listed[:3]) and "and 6 more" in files
        for side in load_splits(DataConfig(str(path))).__dict__.values():
            assert f"left out     {files}\nleft out     {bare}" in describe(side)
        assert f"left out: {files}" in read_external(path).notes
    flags = ["--steps", "1", "--batch-size", "4", "--model.width", "16", "--model.downsample", "4"]
    done = script("train_tokenizer", "digits-fsq", "--data", tmp_path / "set", *flags, "--out", tmp_path / "run")
    assert f"left out     {files}" in done.out and f"left out     {bare}" in (tmp_path / "run" / "log.txt").read_text()


def test_folders_of_left_overs_alone_are_named(tmp_path: Path) -> None:
    content = {
        **images("cat/0.png", "dog/1.png"),
        "bee/.keep": b"",
        "emu/2024/Thumbs.db": b"",
        "__MACOSX/fox/._0.png": b"",
    }
    for path in both(tmp_path, content):
        assert load_images(str(path)).left_out[1:] == ("folders without images: bee, emu",)


def test_classes_are_not_left_out_by_a_part_of_their_name() -> None:
    names = ("thumbs", "thumb", "macosx", "recycle", "eaDir", "trash", "desktop", "icon", "previews")
    assert [junk(f"{name}/0.png") for name in names] == [None] * len(names)
    assert junk("cat/Icon\r") and junk("cat/@eadir/0.png") and junk("__macosx/0.png") and junk("cat/THUMBS.DB")


def test_a_folder_in_which_no_image_decodes_keeps_its_class(tmp_path: Path) -> None:
    content = images(*(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(60)))
    data = load_images(str(folder_of(tmp_path, {**content, "bee/0.png": b""})), on_bad_image="skip")
    assert data.classes == ("bee", "cat", "dog") and data.labels.unique().tolist() == [1, 2]
    assert "no images    of 1 of 3 classes: bee" in describe(data)


@pytest.mark.parametrize("ending", ["jpe", "jfif", "jif", "jfi", "JPG", "JPEG", "jpg_large", "Jpeg", "mpo"])
def test_all_endings_of_jpeg(tmp_path: Path, ending: str) -> None:
    save(tmp_path / "a.jpg", noise(8, 8, 3))
    (tmp_path / f"b.{ending}").write_bytes((tmp_path / "a.jpg").read_bytes())
    data = load_images(str(tmp_path))
    assert len(data.images) == 2 and data.conversions == ("2 images: lossy JPEG source",) and data.left_out == ()


def test_other_endings_of_formats_that_are_read(tmp_path: Path) -> None:
    for ending, kind in (
        ("dib", "BMP"),
        ("apng", "PNG"),
        ("pnm", "PPM"),
        ("TIFF", "TIFF"),
        ("jpg", "PNG"),
        ("png", "JPEG"),
    ):
        Image.fromarray(noise(4, 4, 3)).save(tmp_path / f"{ending}.{ending}", format=kind)
    assert len(load_images(str(tmp_path)).images) == 6
    assert not is_image("a.pngx") and not is_image("jpg") and not is_image("a.jpg.txt")


# ---- samples of others ----


def test_samples_follow_the_same_rules(tmp_path: Path) -> None:
    rows = csv_bytes([("file_name", "label"), *((f"{number}.png", number // 3) for number in range(6))])
    path = folder_of(tmp_path, {**images(*(f"{number}.png" for number in range(6))), "metadata.csv": rows})
    found, data = read_external(path), load_images(str(path))
    assert found.pixels.tolist() == data.images[:][[0, 3, 1, 4, 2, 5]].tolist()
    assert any("take turns" in note for note in found.notes) and any("metadata.csv" in note for note in found.notes)
    assert replace(found, name="x").fingerprint == found.fingerprint
