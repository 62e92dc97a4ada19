"""Folders of records: what is written is read, by any thread, and damage is named."""

import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DiskError
from midway.gen.files.record_writer import (
    RecordFormat,
    ShardIndex,
    read_shard_index,
    records_per_shard,
    seal,
    write_shard,
)
from midway.gen.files.records import DTYPES, Records, is_records, open_records, record_bytes

REMAKE = "make it again"


def _numbers(count: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
    words = torch.randint(0, 256, (count, record_bytes(dtype, shape)), generator=torch.Generator().manual_seed(count))
    return words.to(torch.uint8).view(DTYPES[dtype]).view(count, *shape)


def _write(folder: Path, values: Tensor, form: RecordFormat, per_shard: int, batch: int = 3) -> Records:
    """`values` in shards, with their numbers as labels."""
    folder.mkdir(parents=True, exist_ok=True)

    def batches(part: Tensor, first: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for at in range(0, len(part), batch):
            some = part[at : at + batch]
            yield some, {"labels": torch.arange(first + at, first + at + len(some))}

    parts = values.split(per_shard)
    indices = [write_shard(folder, i, form, batches(part, i * per_shard)) for i, part in enumerate(parts)]
    seal(folder, "test", form, indices, {"name": "abc"})
    return open_records(folder, "test", REMAKE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_records_are_read_in_any_order(dtype: str, tmp_path: Path) -> None:
    values = _numbers(23, dtype, (2, 3))
    records = _write(tmp_path, values, RecordFormat(dtype, (2, 3)), per_shard=7)
    for items in (torch.arange(23), torch.tensor([5, 6, 7, 8, 0, 22, 22, 3]), torch.tensor([], dtype=torch.int64)):
        found, wanted = records.read(items), values[items]
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))  # NaN, too
    assert torch.equal(records.tensor("labels"), torch.arange(23))
    assert len(records) == 23 and records.facts == {"name": "abc"}
    records.verify()
    with pytest.raises(IndexError):
        records.read(torch.tensor([23]))
    with pytest.raises(IndexError):
        records.read(torch.tensor([-1]))


def test_shards_are_files_of_numpy(tmp_path: Path) -> None:
    values = _numbers(10, "float16", (4,))
    _write(tmp_path, values, RecordFormat("float16", (4,)), per_shard=6)
    parts = [np.load(tmp_path / f"records-0000{i}.npy", mmap_mode="r", allow_pickle=False) for i in (0, 1)]
    assert [part.shape for part in parts] == [(6, 4), (4, 4)]
    assert np.array_equal(np.concatenate(parts), values.numpy(), equal_nan=True)


def test_byte_strings(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 256, (n,), generator=generator).to(torch.uint8) for n in (3, 0, 700, 1, 25)]
    form = RecordFormat("uint8", None)
    indices = [write_shard(tmp_path, i, form, [(texts[a:b], {})]) for i, (a, b) in enumerate([(0, 2), (2, 2), (2, 5)])]
    seal(tmp_path, "test", form, indices, {})
    records = open_records(tmp_path, "test", REMAKE)
    for item in (4, 0, 2, 1, 3, 2):
        assert records.read_bytes(item) == texts[item].numpy().tobytes()
    with pytest.raises(ValueError, match="read_bytes"):
        records.read(torch.tensor([0]))


def test_reading_is_safe_in_threads_and_a_pickle_is_small(tmp_path: Path) -> None:
    values = _numbers(400, "uint8", (50,))
    written = _write(tmp_path, values, RecordFormat("uint8", (50,)), per_shard=37)
    records = pickle.loads(pickle.dumps(written))  # noqa: S301 (worker processes do)
    assert len(pickle.dumps(records)) < 10_000
    wrong = list[int]()

    def read(seed: int) -> None:
        for turn in range(30):
            items = torch.randint(0, 400, (20,), generator=torch.Generator().manual_seed(1000 * seed + turn))
            if not torch.equal(records.read(items), values[items]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("records-*.npy"))]


def test_writing_goes_on_after_an_error_with_the_same_bytes(tmp_path: Path) -> None:
    """A shard is there whole or not at all; those that are there are not written again."""
    values, form = _numbers(20, "int32", (3,)), RecordFormat("int32", (3,))
    _write(tmp_path / "whole", values, form, per_shard=5)
    folder = tmp_path / "killed"
    folder.mkdir()

    def failing() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        yield values[5:8], {"labels": torch.arange(5, 8)}
        raise OSError(28, "No space left on device")

    first = write_shard(folder, 0, form, [(values[:5], {"labels": torch.arange(5)})])
    with pytest.raises(DiskError, match="free disk space"):
        write_shard(folder, 1, form, failing())
    assert {path.name for path in folder.iterdir()} == {"records-00000.npy", "records-00000.npy.index"}
    found = read_shard_index(folder, 0, form)
    assert found is not None and (found.count, found.sha256) == (first.count, first.sha256)
    assert read_shard_index(folder, 1, form) is None
    assert not is_records(folder)
    with pytest.raises(DataError, match="no finished set"):
        open_records(folder, "test", REMAKE)
    indices: list[ShardIndex] = [found]
    for i in (1, 2, 3):
        part = values[5 * i : 5 * i + 5]
        indices.append(write_shard(folder, i, form, [(part, {"labels": torch.arange(5 * i, 5 * i + 5)})]))
    seal(folder, "test", form, indices, {"name": "abc"})
    assert _shards(folder) == _shards(tmp_path / "whole")
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    assert (folder / "index.safetensors").read_bytes() == (tmp_path / "whole" / "index.safetensors").read_bytes()
    assert not list(folder.glob("*.index"))


def test_a_truncated_shard_has_no_index(tmp_path: Path) -> None:
    form = RecordFormat("uint8", (8,))
    write_shard(tmp_path, 0, form, [(_numbers(5, "uint8", (8,)), {})])
    path = tmp_path / "records-00000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert read_shard_index(tmp_path, 0, form) is None


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "missing"])
def test_a_damaged_shard_is_named(damage: str, tmp_path: Path) -> None:
    records = _write(tmp_path, _numbers(9, "uint8", (16,)), RecordFormat("uint8", (16,)), per_shard=4)
    path = tmp_path / "records-00001.npy"
    data = bytearray(path.read_bytes())
    data[128 + 16 + 3] ^= 1  # in the second record of the shard
    texts = {"changed": bytes(data), "shorter": bytes(data[:-1]), "longer": bytes(data) + b"x"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(texts[damage])
    if damage == "changed":
        found = open_records(tmp_path, "test", REMAKE)
        assert len(found.read(torch.tensor([0, 4, 6]))) == 3
        with pytest.raises(DataError, match=r"records-00001.npy has changed[\s\S]*record 5[\s\S]*make it again"):
            found.read(torch.tensor([4, 5]))
        with pytest.raises(DataError, match=r"records-00001.npy has changed"):
            found.verify()
    else:
        with pytest.raises(DataError, match=r"records-00001.npy cannot be read[\s\S]*make it again"):
            open_records(tmp_path, "test", REMAKE)
    if damage in ("missing", "shorter"):  # while it is read
        with pytest.raises(DataError, match=r"records-00001.npy"):
            records.read(torch.tensor([7]))


@pytest.mark.parametrize("name", ["index.safetensors", "labels"])
def test_a_changed_index_is_named(name: str, tmp_path: Path) -> None:
    _write(tmp_path, _numbers(9, "uint8", (16,)), RecordFormat("uint8", (16,)), per_shard=4)
    path = tmp_path / "index.safetensors"
    data = bytearray(path.read_bytes())
    if name == "labels":
        data[-1] ^= 1  # a valid file with another number
    path.write_bytes(bytes(data) if name == "labels" else bytes(data[:-1]))
    with pytest.raises(DataError, match=r"index.safetensors cannot be read[\s\S]*make it again"):
        open_records(tmp_path, "test", REMAKE).tensor("labels")


def test_other_folders_are_none(tmp_path: Path) -> None:
    _write(tmp_path / "a", _numbers(2, "uint8", (1,)), RecordFormat("uint8", (1,)), per_shard=4)
    assert is_records(tmp_path / "a", "test") and not is_records(tmp_path / "a", "images")
    with pytest.raises(DataError, match="'test'"):
        open_records(tmp_path / "a", "images", REMAKE)
    for text in ("{", "[]", '{"format": 3}', json.dumps({"format": "midway-records-1", "kind": "test", "shards": 1})):
        (tmp_path / "a" / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest.json cannot be read"):
            open_records(tmp_path / "a", "test", REMAKE)


def test_a_record_of_another_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not uint8"):
        write_shard(tmp_path, 0, RecordFormat("uint8", (2,)), [(torch.zeros(1, 3, dtype=torch.uint8), {})])
    with pytest.raises(ValueError, match="not uint8"):
        write_shard(tmp_path, 0, RecordFormat("uint8", (2,)), [(torch.zeros(1, 2), {})])
    assert not list(tmp_path.iterdir())


def test_the_size_of_shards() -> None:
    assert records_per_shard(1000, 196_608) == (256 << 20) // 196_608
    assert records_per_shard(10**7, 196_608) == 50_000  # at most 200 shards
    assert records_per_shard(0, 0) >= 1
