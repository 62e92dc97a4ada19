"""Tar and parquet files are sources like folders: the same files give the same set, and labels come from where they are."""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import noise, save
from PIL import Image

from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.build import build
from midway.gen.data.images import ImageData, load_images
from midway.gen.data.splits import DataConfig
from midway.gen.files.shards import set_name, shard_paths


def png(seed: int, *shape: int) -> bytes:
    path = io.BytesIO()
    Image.fromarray(noise(*(shape or (6, 6, 3)), seed=seed)).save(path, "PNG")
    return path.getvalue()


def tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def same(a: ImageData, b: ImageData) -> bool:
    return a.fingerprint == b.fingerprint and torch.equal(a.images[:], b.images[:]) and a.classes == b.classes


LAYOUTS: dict[str, dict[str, bytes]] = {
    "classes": {"set/cat/1.png": png(1), "set/dog/2.png": png(2), "set/cat/0.png": png(3), "set/notes.md": b"x"},
    "flat": {"b.png": png(1), "a.png": png(2)},
    "edm": {
        "00000/img00000000.png": png(1),
        "00000/img00000001.png": png(2),
        "dataset.json": json.dumps({"labels": [["00000/img00000000.png", 7], ["00000/img00000001.png", 2]]}).encode(),
    },
    "metadata": {"a.png": png(1), "b.png": png(2), "metadata.csv": b"file_name,label\na.png,x\nb.png,y\n"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_a_zip_a_tar_and_their_built_sets_are_one_set(layout: str, tmp_path: Path) -> None:
    members = LAYOUTS[layout]
    for name, data in members.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    tar(tmp_path / "packed.tar", members)
    wanted = load_images(str(tmp_path / "folder"))
    assert len(wanted.classes) == (1 if layout == "flat" else 2)
    for name in ("packed.zip", "packed.tar"):
        found = load_images(str(tmp_path / name))
        assert same(found, wanted) and found.conversions == wanted.conversions and found.left_out == wanted.left_out
        for keep in (False, True):
            out = tmp_path / f"{name}-{keep}"
            build(DataConfig(str(tmp_path / name)), out, keep)
            assert same(load_images(str(out)), wanted)


# ---- WebDataset ----


def samples(first: int, count: int, ending: str, label: Any) -> dict[str, bytes]:
    found = dict[str, bytes]()
    for index in range(first, first + count):
        found[f"{index:06}.png"] = png(index)
        found[f"{index:06}{ending}"] = label(index)
    return found


@pytest.mark.parametrize(
    ("ending", "label", "classes"),
    [
        (".cls", lambda i: str(i % 2 + 9).encode(), ("9", "10")),
        (".cls", lambda i: b"cat\n" if i % 2 else b"dog", ("cat", "dog")),
        (".json", lambda i: json.dumps({"label": i % 2, "size": [6, 6]}).encode(), ("0", "1")),
        (".json", lambda i: json.dumps({"caption": "a cat"}).encode(), ("all",)),
        (".txt", lambda i: str(i % 2).encode(), ("0", "1")),
        (".txt", lambda i: b"a photo of a cat", ("all",)),
    ],
)
def test_shards_of_a_web_dataset(ending: str, label: Any, classes: tuple[str, ...], tmp_path: Path) -> None:
    for shard in range(3):
        tar(tmp_path / "shards" / f"train-{shard:03}.tar", samples(5 * shard, 5, ending, label))
    tar(tmp_path / "shards" / "train-003.tar", {})
    found = load_images(str(tmp_path / "shards"))
    assert found.images.shape == (15, 3, 6, 6) and found.classes == classes
    want = [
        classes.index(label(i).decode().strip()) if ending == ".cls" else i % 2 * (len(classes) > 1) for i in range(15)
    ]
    assert found.labels.tolist() == want
    assert torch.equal(
        found.images[:], torch.stack([torch.from_numpy(noise(6, 6, 3, seed=i)).permute(2, 0, 1) for i in range(15)])
    )
    assert bool(found.left_out) == (classes == ("all",))  # what gave labels is not left out
    for pattern in ("train-{000..003}.tar", "train-*.tar", "train-{000,001,002}.tar"):
        assert same(load_images(str(tmp_path / "shards" / pattern)), found)
    part = load_images(str(tmp_path / "shards" / "train-{000..001}.tar"))
    assert len(part.images) == 10 and part.name == "train"


def test_names_that_recur_in_shards(tmp_path: Path) -> None:
    for shard in range(2):
        tar(tmp_path / f"{shard:03}.tar", {"0.png": png(shard), "0.cls": str(shard).encode()})
    found = load_images(str(tmp_path))
    assert found.labels.tolist() == [0, 1]
    assert torch.equal(found.images[1:][0], torch.from_numpy(noise(6, 6, 3, seed=1)).permute(2, 0, 1))


def test_tars_that_cannot_be_used(tmp_path: Path) -> None:
    broken, files = tmp_path / "broken.tar", {"0.png": png(0), "1.png": png(1)}
    tar(broken, files)
    whole = broken.read_bytes()
    for end in (1400, 1000, 600, 100):  # within the second header, the first image, the first header
        broken.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"broken.tar cannot be read as a tar"):
            load_images(str(broken))
    tar(tmp_path / "zipped.tar", files, "w:gz")
    with pytest.raises(DataError, match=r"zipped.tar cannot be read as a tar[\s\S]*uncompressed"):
        load_images(str(tmp_path / "zipped.tar"))
    tar(tmp_path / "twice.tar", [("0.png", png(0)), ("0.png", png(1))])
    with pytest.raises(DataError, match=r"two members of .*twice.tar have one name"):
        load_images(str(tmp_path / "twice.tar"))
    tar(tmp_path / "out.tar", {"../0.png": png(0)})
    with pytest.raises(DataError, match="outside of its source"):
        load_images(str(tmp_path / "out.tar"))
    tar(tmp_path / "some.tar", {**files, "0.cls": b"3"})
    with pytest.raises(DataError, match=r"1 of 2 images have a label in a .cls file[\s\S]*1.png has none"):
        load_images(str(tmp_path / "some.tar"))
    tar(tmp_path / "none.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match="no images in"):
        load_images(str(tmp_path / "none.tar"))


def test_patterns_and_splits(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train-1.tar", "test-0.tar"):
        tar(tmp_path / name, {f"{name}.png": png(0)})
    with pytest.raises(DataError, match=r"has the splits test, train[\s\S]*test-\*.tar"):
        load_images(str(tmp_path))
    with pytest.raises(DataError, match=r"train-2.tar does not exist[\s\S]*train-\{0..2\}.tar"):
        load_images(str(tmp_path / "train-{0..2}.tar"))
    with pytest.raises(DataError, match="no file is called"):
        load_images(str(tmp_path / "val-*.tar"))
    with pytest.raises(DataError, match="does not exist"):
        load_images(str(tmp_path / "val-0.tar"))
    (tmp_path / "train-1.tar").unlink()
    assert [path.name for path in shard_paths(tmp_path / "{train,test}-{0..0}.tar")] == ["train-0.tar", "test-0.tar"]
    assert set_name(tmp_path / "*.tar") == tmp_path.name and set_name(tmp_path / "train-0.tar") == "train-0"
    (tmp_path / "cat").mkdir()
    assert shard_paths(tmp_path) == []  # a folder of classes that holds a tar beside them


# ---- parquet ----


def table(rows: int, names: list[str] | None = None, first: int = 0, **columns: Any) -> Any:
    pa = pytest.importorskip("pyarrow")
    images = [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(rows)]
    found = {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    found |= {name: pa.array(values) for name, values in columns.items()}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(found).replace_schema_metadata(metadata if names is not None else None)


def write(path: Path, rows: Any, group: int = 3) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows, path, row_group_size=group)
    return path


def test_parquet_files_of_hugging_face(tmp_path: Path) -> None:
    names = ["zebra", "ant", "none of these"]
    write(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", table(4, names, 7, label=[1, 0, 0, 1]))
    write(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", table(7, names, label=[0, 1] * 3 + [1]))
    found = load_images(str(tmp_path / "set"))
    assert found.classes == tuple(names) and found.labels.tolist() == [0, 1] * 3 + [1, 1, 0, 0, 1]
    pixels = torch.stack([torch.from_numpy(noise(6, 6, 3, seed=i)).permute(2, 0, 1) for i in range(11)])
    assert torch.equal(found.images[:], pixels) and "labels of the column label" in found.conversions[-1]
    for source in ("data/train-*.parquet", "data/train-{00000..00001}-of-00002.parquet", "data"):
        assert same(load_images(str(tmp_path / "set" / source)), found)
    build(DataConfig(str(tmp_path / "set")), tmp_path / "out", keep_encoded=True, workers=2)
    assert same(load_images(str(tmp_path / "out")), found)
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", table(1, names, label=[0]))
    with pytest.raises(DataError, match=r"has the splits test, train[\s\S]*test-\*.parquet"):
        load_images(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"label": ["b", "a", "b"]}, ("a", "b")),
        ({"Class": [10, 9, 10]}, ("9", "10")),
        ({"caption": ["x", "y", "z"]}, ("all",)),
    ],
)
def test_plain_columns_of_labels(columns: dict[str, Any], classes: tuple[str, ...], tmp_path: Path) -> None:
    found = load_images(str(write(tmp_path / "a.parquet", table(3, **columns))))
    assert found.classes == classes and found.name == "a"
    assert found.labels.tolist() == ([0, 0, 0] if len(classes) == 1 else [1, 0, 1])


def test_parquet_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    for label in (-1, 2):
        with pytest.raises(
            DataError, match=rf"row 1 of .*a.parquet has a label of no class[\s\S]*label is {label}, and there are 2"
        ):
            load_images(str(write(tmp_path / "a.parquet", table(2, ["x", "y"], label=[0, label]))))
    with pytest.raises(DataError, match=r"row 1 of .* has no label"):
        load_images(str(write(tmp_path / "a.parquet", table(2, label=[0, None]))))
    with pytest.raises(DataError, match=r"no images in[\s\S]*columns are x"):
        load_images(str(write(tmp_path / "a.parquet", pa.table({"x": [1]}))))
    with pytest.raises(DataError, match="it has no rows"):
        load_images(str(write(tmp_path / "a.parquet", table(0))))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as parquet"):
        load_images(str(tmp_path / "a.parquet"))
    empty = table(1).set_column(
        0, "image", pa.array([{"bytes": None, "path": "/far/away.png"}], table(1).schema[0].type)
    )
    with pytest.raises(DataError, match=r"a\[0000000\] \(OSError: this row has no bytes"):
        load_images(str(write(tmp_path / "a.parquet", empty)))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"need pyarrow[\s\S]*midway\[parquet\]"):
        load_images(str(tmp_path / "a.parquet"))


def test_images_beside_a_parquet_file_are_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "0.png", noise(4, 4))
    (tmp_path / "more.parquet").write_bytes(b"x")
    assert len(load_images(str(tmp_path)).images) == 1
