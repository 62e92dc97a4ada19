"""Inception-v3 with random weights: torch-fidelity's numbers, the same bits for any batch, and never the name FID."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_inception import random_state
from safetensors.torch import save_file
from tensors import pixels
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.features import inception
from midway.gen.features.extractor import Activations
from midway.gen.features.inception import Inception, open_inception, open_pytorch_inception

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = 2


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def extractor(file: Path) -> Inception:
    return open_inception(file, block=BLOCK)


def test_numbers_are_torch_fidelitys_bit_for_bit(extractor: Inception, file: Path) -> None:
    theirs = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
    features, logits = theirs(pixels(BLOCK, 3, 32))
    found = extractor.activations(pixels(BLOCK, 3, 32))
    assert found.logits is not None
    assert torch.equal(found.features, features)
    assert torch.equal(found.logits, logits)
    assert found.features.shape == (BLOCK, extractor.dim)
    assert found.logits.shape == (BLOCK, 1008)
    assert extractor.has_logits
    assert found.features.isfinite().all()
    assert 0.01 < found.features.std() < 100


def test_bits_do_not_depend_on_the_batch_or_on_autocast(extractor: Inception) -> None:
    images = pixels(3, 1, 32)
    whole = extractor.activations(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        last = extractor.activations(images[2:].expand(-1, 3, -1, -1))
    assert torch.equal(last.features, whole.features[2:])
    assert last.logits is not None
    assert whole.logits is not None
    assert torch.equal(last.logits, whole.logits[2:])


def test_the_network_always_sees_one_whole_block(extractor: Inception, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        extractor,
        "block_activations",
        lambda x: seen.append(tuple(x.shape)) or Activations(torch.zeros(len(x), 1), None),
    )
    for count, channels in ((0, 3), (1, 1), (2, 3), (5, 1)):
        assert len(extractor.features(pixels(count, channels, 32))) == count
    assert seen == [(BLOCK, 3, 32, 32)] * 6


def test_no_images(extractor: Inception) -> None:
    found = extractor.activations(pixels(0, 3, 32))
    assert found.features.shape == (0, 2048)
    assert found.logits is not None
    assert found.logits.shape == (0, 1008)


@pytest.mark.parametrize("bad", [pixels(2, 3, 32).float(), pixels(2, 2, 32), pixels(2, 3, 32)[0], pixels(2, 4, 32)])
def test_other_images_raise(bad: Tensor, extractor: Inception) -> None:
    with pytest.raises(ValueError, match="needs uint8 images"):
        extractor.features(bad)
    with pytest.raises(DataError, match=r"the model makes torch\."):
        extractor.check(bad, "the model makes")
    extractor.check(pixels(2, 3, 32), "the model makes")


def test_random_weights_are_never_called_fid(extractor: Inception) -> None:
    assert re.fullmatch(r"inception-v3-2015-12-05@[0-9a-f]{12}\+tf1-bilinear-299", extractor.name)
    assert extractor.label == f"Fréchet distance ({extractor.name})"
    assert extractor.name in extractor.note
    assert not any("FID" in text for text in (extractor.name, extractor.label, extractor.note))


def test_only_the_published_file_is_called_fid(
    file: Path, extractor: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "INCEPTION", replace(inception.INCEPTION, digits=digest[:8]))
    published = open_inception(file, block=BLOCK)
    assert published.label == "FID"
    assert published.name == f"inception-v3-2015-12-05@{digest[:12]}+tf1-bilinear-299"
    assert published.name != extractor.name


def test_the_published_checksum() -> None:
    assert inception.INCEPTION.digits == "6726825d"
    assert inception.INCEPTION.url == fidelity.URL_INCEPTION_V3


def test_the_environment_names_weights(file: Path, extractor: Inception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDWAY_INCEPTION_WEIGHTS", str(file))
    random_state = torch.random.get_rng_state()
    assert open_inception(block=BLOCK).name == extractor.name
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_safetensors_have_the_same_name_and_other_weights_another(
    state: dict[str, Tensor], extractor: Inception, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "same.safetensors")
    assert open_inception(tmp_path / "same.safetensors").name == extractor.name
    save_file({**state, "fc.bias": state["fc.bias"] + 1}, tmp_path / "other.safetensors")
    assert open_inception(tmp_path / "other.safetensors").name != extractor.name


@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
def test_weights_of_another_type_raise(kind: torch.dtype, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({**state, "fc.bias": state["fc.bias"].to(kind)}, tmp_path / "bad.safetensors")
    with pytest.raises(DataError, match=r"bad\.safetensors(.|\n)*fc.bias .* instead of float32"):
        open_inception(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("how", ["missing", "surplus", "shape"])
def test_weights_of_other_networks_raise(how: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    bad = dict(state)
    if how == "missing":
        del bad["fc.bias"]
    else:
        bad["fc.bias" if how == "shape" else "fc.surplus"] = torch.ones(3)
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(DataError, match=r"bad\.safetensors(.|\n)*not those of Inception-v3.*fc\."):
        open_inception(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (28, 28), (299, 299), (310, 600)])
def test_the_resize_is_tensorflow_1s(size: tuple[int, int]) -> None:
    """source = target * in / out: no half-pixel centres, no antialiasing, the last pixel repeated."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (1, 2, *size), generator=generator).double()
    expected = images
    for dim, count in ((2, size[0]), (3, size[1])):
        source = torch.arange(299, dtype=torch.float64) * count / 299
        low = source.floor().long()
        share = (source - low).view(-1, 1) if dim == 2 else source - low
        high = (low + 1).clamp(max=count - 1)
        expected = expected.index_select(dim, low) * (1 - share) + expected.index_select(dim, high) * share
    found = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)  # grey levels; its sources are float32
    half_pixel = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear")
    assert size == (299, 299) or (half_pixel - expected).abs().max() > 5


# ---- as pytorch-fid reads images ----


@pytest.mark.slow
def test_pytorch_fids_network_is_the_same_on_other_pixels(extractor: Inception, file: Path) -> None:
    """At 299 pixels neither resizes: (x - 128) / 128 of torch-fidelity becomes 2 x / 255 - 1."""
    theirs, images = open_pytorch_inception(file, block=BLOCK), pixels(BLOCK, 3, 299)
    assert torch.equal(theirs.stages((images.float() - 128) / 128).flatten(1), extractor.features(images))
    expected = theirs.stages(2 * (images.float() / 255) - 1).flatten(1)
    assert torch.equal(theirs.features(images), expected)
    assert not torch.equal(expected, extractor.features(images))


def test_pytorch_fids_resize_has_half_pixel_centres(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """source = (target + 1/2) in / out - 1/2, clamped at both ends, without antialiasing."""
    theirs, seen = open_pytorch_inception(file, block=1), []
    monkeypatch.setattr(theirs.stages, "forward", lambda x: seen.append(x) or torch.zeros(1, 2048, 1, 1))
    for size in ((32, 32), (5, 7), (310, 600)):
        images = pixels(1, 3, 1).expand(1, 3, *size).clone().random_(0, 256)
        theirs.features(images)
        expected = images.double()
        for dim, count in ((2, size[0]), (3, size[1])):
            source = ((torch.arange(299, dtype=torch.float64) + 0.5) * count / 299 - 0.5).clamp(0, count - 1)
            low = source.floor().long()
            share = (source - low).view(-1, 1) if dim == 2 else source - low
            high = (low + 1).clamp(max=count - 1)
            expected = expected.index_select(dim, low) * (1 - share) + expected.index_select(dim, high) * share
        torch.testing.assert_close(seen.pop().double(), 2 * expected / 255 - 1, rtol=0, atol=1e-3)


def test_pytorch_fids_distance_has_a_name_of_its_own(file: Path, extractor: Inception) -> None:
    theirs = open_pytorch_inception(file, block=BLOCK)
    assert theirs.name.startswith("inception-pytorch-") and theirs.name.endswith("+torch-bilinear-299")
    assert theirs.name.split("@")[1][:12] == extractor.name.split("@")[1][:12] and "FID" not in theirs.label
