"""The benchmark of stored images: every container gives the same images."""

from pathlib import Path

import benchmark_modules
import pytest
import torch


def test_all_containers_hold_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = benchmark_modules.benchmark("storage")
    monkeypatch.setattr(storage, "READ_BATCHES", 2)
    storage.write(tmp_path, 70)
    items = torch.tensor([3, 69, 0, 3])
    wanted = storage.reader("records", tmp_path)(items)
    assert wanted.shape == (4, *storage.SHAPE) and torch.equal(wanted[0], wanted[3])
    for name in storage.NAMES:
        if name == "arrow":
            pytest.importorskip("pyarrow")
        assert torch.equal(storage.reader(name, tmp_path)(items), wanted)
        assert storage.measure(name, tmp_path, 70, 0)["images_per_second"] > 0
