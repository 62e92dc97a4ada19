"""Feature networks: the same bits for any batch, a name that follows the weights, files that are whole or raise."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensors import pixels
from torch import Tensor

from midway.gen.core.errors import DataError, DiskError
from midway.gen.features.classifier import (
    FeatureConfig,
    FeatureNetwork,
    feature_hash,
    load_features,
    protocol_name,
    save_features,
)
from midway.gen.training.batches import ImageBatch

torch.set_num_threads(1)


def network(channels: int = 1, size: int = 8) -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(FeatureConfig(channels, size, classes=10, width=8, dim=6))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_features_of_every_size(channels: int, size: int) -> None:
    result = network(channels, size).features(pixels(3, channels, size))
    assert result.shape == (3, 6)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert not result.requires_grad


def test_a_batch_without_samples_has_no_loss() -> None:
    net = network()
    loss, logs = net.loss(ImageBatch(pixels(0), torch.zeros(0, dtype=torch.int64)), None)
    loss.backward()
    assert loss.item() == logs["accuracy"].item() == 0
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_features_do_not_depend_on_the_batch_size() -> None:
    x, net = pixels(300), network()
    whole = net.features(x)
    for size in (1, 7, 128, 256, 299):
        parts = torch.cat([net.features(part) for part in x.split(size)][:8])
        assert torch.equal(parts, whole[: len(parts)])


def test_features_do_not_depend_on_the_neighbours() -> None:
    x, net = pixels(300), network()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    assert torch.equal(net.features(x[order]), net.features(x)[order])


def test_features_ignore_autocast_and_reduced_precision() -> None:
    x, net = pixels(20), network()
    plain = net.features(x)
    before = torch.get_float32_matmul_precision()
    matmul = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 (pyright does not know it)
    try:
        torch.set_float32_matmul_precision("medium")
        assert matmul.fp32_precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net.features(x), plain)
        assert matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_features_of_no_images() -> None:
    assert network().features(pixels(0)).shape == (0, 6)


def test_features_are_what_the_classifier_reads() -> None:
    net, x = network(), pixels(5)
    labels = torch.arange(5)
    loss, logs = net.loss(ImageBatch(x, labels), None)
    logits = net.classify(net.features(x))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)
    assert logs["accuracy"] == (logits.argmax(dim=1) == labels).float().mean()


def test_every_weight_learns() -> None:
    net = network()
    net.loss(ImageBatch(pixels(8), torch.arange(8)), None)[0].backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in net.parameters())


def test_training_separates_bright_from_dark() -> None:
    net = network()
    labels = torch.arange(32) % 2
    x = (pixels(32) // 2 + 127 * labels[:, None, None, None]).to(torch.uint8)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        net.loss(ImageBatch(x, labels), None)[0].backward()
        optimizer.step()
        net.after_step(torch.tensor(True, device="meta"))  # a value that cannot be waited for
    assert net.loss(ImageBatch(x, labels), None)[1]["accuracy"] == 1


@pytest.mark.parametrize("bad", [pixels(2).float(), pixels(2, 3), pixels(2, 1, 16), pixels(2)[0]])
def test_other_images_raise(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        network().features(bad)


@pytest.mark.parametrize(
    "bad", [{"image_size": 4}, {"width": 12}, {"width": 0}, {"classes": 1}, {"dim": 1}, {"in_channels": 0}]
)
def test_impossible_configs_raise(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}.*{next(iter(bad.values()))}"):
        FeatureConfig(**{"in_channels": 1, "image_size": 8, "classes": 10, **bad})


def test_hash_follows_every_weight_and_the_config() -> None:
    net = network()
    original = feature_hash(net)
    assert original == feature_hash(network())
    assert len(original) == 12
    for weight in net.state_dict().values():
        stored = weight.flatten()[0].clone()
        weight.view(-1)[0] = torch.nextafter(stored, torch.tensor(9.0))
        assert feature_hash(net) != original
        weight.view(-1)[0] = stored
    assert feature_hash(net) == original
    resized = FeatureNetwork(FeatureConfig(1, 16, classes=10, width=8, dim=6))
    resized.load_state_dict(net.state_dict())
    assert feature_hash(resized) != original


def test_protocol_name() -> None:
    net = network()
    assert protocol_name(net, "digits") == f"cnn-digits@{feature_hash(net)}"


def test_file_round_trip(tmp_path: Path) -> None:
    net, path = network(), tmp_path / "new" / "features.safetensors"
    save_features(net, path, "digits")
    loaded = load_features(path)
    assert loaded.name == protocol_name(net, "digits")
    assert loaded.config == net.config
    assert torch.equal(loaded.features(pixels(9)), net.features(pixels(9)))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train it again"):
        load_features(tmp_path / "absent.safetensors")


def test_every_kind_of_damage_raises(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    save_features(network(), path, "digits")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    renamed = whole.replace(b"midway-features", b"another-feature")
    newer = whole.replace(b'"version":"1"', b'"version":"9"')
    rewired = whole.replace(b'\\"dim\\": 6', b'\\"dim\\": 7')
    assert len({bytes(flipped), renamed, newer, rewired, whole}) == 5
    for damaged in (bytes(flipped), renamed, newer, rewired, whole[:-1], whole[:40], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot use the feature network"):
            load_features(path)


def test_another_safetensors_file_raises(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not those of a feature network"):
        load_features(tmp_path / "other.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_directory_is_a_disk_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError):
        save_features(network(), tmp_path / "features.safetensors", "digits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_features_keep_their_precision_and_so_their_name(dtype: torch.dtype) -> None:
    x, net = pixels(3), network()
    expected, name = net.features(x), feature_hash(net)
    for moved in (net.to(dtype), torch.nn.ModuleList([net]).to(dtype)[0]):
        assert isinstance(moved, FeatureNetwork)
        assert torch.equal(moved.features(x), expected)
        assert feature_hash(moved) == name
