"""What --features names: effnet-lite0 by default, the pixels, or a run; features of another split raise DataError."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import Script

from midway.gen.core.config import read_yaml, write_yaml
from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.load import CPU, load_model
from midway.gen.features.classifier import load_features
from midway.gen.features.efficientnet import EFFNET, FULL
from midway.gen.features.inception import INCEPTION, PYTORCH
from midway.gen.features.open import DEFAULT, NAMED, PUBLISHED, named_extractor, open_features
from midway.gen.features.pixels import Pixels
from midway.gen.features.vit import ENCODERS
from midway.gen.metrics.class_share import between_class_share


def test_a_run_of_other_images_raises(pipeline, tmp_path: Path) -> None:
    data = load_model(pipeline.model, CPU).data
    other = Path(shutil.copytree(pipeline.features, tmp_path / "b"))
    values = read_yaml(other / "config.yaml")
    values["data"]["split_seed"] = 7
    write_yaml(other / "config.yaml", values)
    assert open_features(pipeline.features, data, "the model").path == pipeline.features
    with pytest.raises(DataError, match="other images than the model"):
        open_features(other, data, "the model")


def test_a_run_is_an_extractor_of_its_own_images(pipeline) -> None:
    data = load_model(pipeline.model, CPU).data
    images = load_splits(data).train.images[:5]
    network = load_features(open_features(pipeline.features, data, "").checkpoint / "features.safetensors")
    for words in (pipeline.features, str(pipeline.features)):
        found = named_extractor(words, data, "the model")
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


def test_a_trained_network_records_its_between_class_share(pipeline) -> None:
    *_, last = [json.loads(line) for line in (pipeline.features / "metrics.jsonl").read_text().splitlines()]
    data = load_model(pipeline.model, CPU).data
    held_out, network = load_splits(data).held_out, named_extractor(pipeline.features, data, "the model")
    expected = between_class_share(network.features(held_out.images[:]), held_out.labels)
    assert last["between_class_share"] == pytest.approx(expected, rel=1e-6) and 0 < expected < 1
    assert f"{expected:.0%} of the variance of held-out features" in (pipeline.features / "log.txt").read_text()


def test_the_default_was_not_trained_on_the_data(pipeline) -> None:
    data = load_model(pipeline.model, CPU).data
    if importlib.util.find_spec(EFFNET.package) is None:
        pytest.skip("the package of EfficientNet-Lite0's weights is not installed")
    assert EFFNET.network == DEFAULT
    assert named_extractor(None, data, "the model").name == "effnet-lite0@579344248a93+bicubic-32"
    assert isinstance(named_extractor("pixels", data, "the model"), Pixels)


def test_without_its_package_the_default_names_the_remedy(
    pipeline, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison of tokenizers stops before it measures; likelihoods, where distances are a column of many, go on without."""
    absent = replace(EFFNET, package="no_such_package")
    monkeypatch.setattr("midway.gen.features.efficientnet.EFFNET", absent)
    monkeypatch.delenv(EFFNET.variable, raising=False)
    call = f"evaluate_tokenizer --tokenizers {pipeline.tokenizer} --out {tmp_path}/a --n 20"
    done = script(*call.split())
    assert done.code == 2 and "pip install 'midway[effnet]'" in done.err and "--features none" in done.err
    assert "no-such-package, which is not installed" in done.err and not (tmp_path / "a").exists()
    call = f"evaluate_likelihood --models {pipeline.baseline} --out {tmp_path}/b --n 20 --iwae 0 --draws 1"
    done = script(*call.split())
    assert done.code == 0 and "no distances: its weights are in the package" in done.out, done.err
    done = script(*f"{call} --features effnet-lite0".split())
    assert done.code == 2 and "pip install 'midway[effnet]'" in done.err


def test_names_of_no_extractor_raise(pipeline, tmp_path: Path) -> None:
    data = load_model(pipeline.model, CPU).data
    assert (EFFNET.network, FULL, INCEPTION.network, PYTORCH, *ENCODERS) == PUBLISHED
    assert {*PUBLISHED, "pixels"} == {*NAMED}
    with pytest.raises(UsageError, match=r"did you mean 'dinov2-vitl14'"):
        named_extractor("dino2-vitl14", data, "the model")
    for words in ("pixels", pipeline.features):
        with pytest.raises(UsageError, match="a run has its own weights"):
            named_extractor(words, data, "the model", tmp_path / "weights.pth")
    for name in PUBLISHED:
        with pytest.raises(
            DataError, match=f"weights of {name.removesuffix('-full').removesuffix('-pytorch')} are not on this machine"
        ):
            named_extractor(name, data, "the model", tmp_path / "absent.pth")
