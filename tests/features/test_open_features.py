"""Features are found beside the model that they measure; features of another split raise DataError."""

import shutil
from pathlib import Path

import pytest
import torch

from midway.gen.core.config import read_yaml, write_yaml
from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.load import CPU, load_model
from midway.gen.features.classifier import load_features
from midway.gen.features.inception import INCEPTION
from midway.gen.features.open import PUBLISHED, find_features, open_extractor, open_features
from midway.gen.features.vit import ENCODERS


def _beside(pipeline, folder: Path, *names: str) -> Path:
    shutil.copytree(pipeline.model, folder / "model")
    for name in names:
        shutil.copytree(pipeline.features, folder / name)
    return folder / "model"


def test_the_only_feature_run_of_the_models_images_is_found(pipeline, tmp_path: Path) -> None:
    model = _beside(pipeline, tmp_path, "a", "b")
    config = tmp_path / "b" / "config.yaml"
    values = read_yaml(config)
    values["data"]["split_seed"] = 7
    write_yaml(config, values)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "config.yaml").write_text("- a list\n")
    data = load_model(model, CPU).data
    assert find_features([model], data) == tmp_path.resolve() / "a"
    assert open_features(None, [model], data, "the model").path == tmp_path.resolve() / "a"
    assert open_features(tmp_path / "a", [model], data, "the model").path == tmp_path / "a"
    with pytest.raises(DataError, match="other images than the model"):
        open_features(tmp_path / "b", [model], data, "the model")


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_none_or_several_must_be_named(names: tuple[str, ...], pipeline, tmp_path: Path) -> None:
    model = _beside(pipeline, tmp_path, *names)
    with pytest.raises(UsageError, match="--features is not given"):
        find_features([model], load_model(model, CPU).data)


def test_a_run_is_an_extractor_of_its_own_images(pipeline, tmp_path: Path) -> None:
    model = _beside(pipeline, tmp_path, "a")
    data = load_model(model, CPU).data
    images = load_splits(data).train.images[:5]
    network = load_features(open_features(tmp_path / "a", [model], data, "").checkpoint / "features.safetensors")
    for words in (None, tmp_path / "a", str(tmp_path / "a")):
        found = open_extractor(words, [model], data, "the model")
        assert (found.name, found.dim, found.has_logits) == (network.name, network.config.dim, True)
        assert found.label == f"Fréchet distance ({network.name})"
        assert torch.equal(found.features(images), network.features(images))
        logits, expected = found.activations(images).logits, network.activations(images).logits
        assert logits is not None and expected is not None and torch.equal(logits, expected)
        assert found.to(CPU) is found
        found.check(images, "the model makes")
        for other in (images[:, :, 1:], images.expand(-1, 3, -1, -1), images.float()):
            with pytest.raises(DataError, match=r"the model makes .*8"):
                found.check(other, "the model makes")


def test_names_of_no_extractor_raise(pipeline, tmp_path: Path) -> None:
    model = _beside(pipeline, tmp_path, "a")
    data = load_model(model, CPU).data
    assert PUBLISHED == ("inception", "dinov2-vitb14", "dinov2-vitl14", "clip-vitb32", "clip-vitl14")
    assert (INCEPTION.network, *ENCODERS) == PUBLISHED
    with pytest.raises(UsageError, match=r"did you mean 'dinov2-vitl14'.*clip-vitb32"):
        open_extractor("dino2-vitl14", [model], data, "the model")
    for words in (None, tmp_path / "a"):
        with pytest.raises(UsageError, match="a run has its own weights"):
            open_extractor(words, [model], data, "the model", tmp_path / "weights.pth")
    with pytest.raises(DataError, match="weights of inception are not on this machine"):
        open_extractor("inception", [model], data, "the model", tmp_path / "absent.pth")
    with pytest.raises(DataError, match="weights of clip-vitb32 are not on this machine"):
        open_extractor("clip-vitb32", [model], data, "the model", tmp_path / "absent.pth")
