"""evaluate.py finds the features beside the model, and refuses features of another split."""

import shutil
from pathlib import Path

import evaluate
import pytest

from midway.gen.artefacts import CPU, load_model
from midway.gen.config import read_yaml, write_yaml
from midway.gen.errors import DataError, UsageError
from midway.gen.runs import Run


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
    trained = load_model(model, CPU)
    assert evaluate.find_features(trained) == tmp_path.resolve() / "a"
    evaluate.check_split(Run.open(tmp_path / "a", "features"), trained)
    with pytest.raises(DataError, match="other images than the model"):
        evaluate.check_split(Run.open(tmp_path / "b", "features"), trained)


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_none_or_several_must_be_named(names: tuple[str, ...], pipeline, tmp_path: Path) -> None:
    trained = load_model(_beside(pipeline, tmp_path, *names), CPU)
    with pytest.raises(UsageError, match="--features is not given"):
        evaluate.find_features(trained)
