"""Features are found beside the model that they measure, and refuses features of another split."""

import shutil
from pathlib import Path

import pytest

from midway.gen.artefacts import CPU, load_model
from midway.gen.config import read_yaml, write_yaml
from midway.gen.errors import DataError, UsageError
from midway.gen.feature_runs import find_features, open_features


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
