"""Priors of runs and folders: read bit for bit with their tokenizer, the best in validation first; damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from midway.gen.core import checkpoints
from midway.gen.core.errors import DataError
from midway.gen.core.runs import Run
from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.layout import layout_of
from midway.gen.priors.load import load_prior, write_prior
from midway.gen.priors.registry import Prior, make_prior
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer(levels: tuple[int, ...] = (5, 3, 3)) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(width=8, blocks=1, quantizer={"type": "fsq", "levels": list(levels)})


def prior(seed: int = 0) -> Prior:
    torch.manual_seed(seed)
    config = PriorConfig("masked", split="digits", width=16, depth=1, heads=2)
    return make_prior(config, layout_of(tokenizer(), "digits"), 3, (1,), ("a", "b", "c"))


def make_run(path: Path, text: str | None = None, levels: tuple[int, ...] = (5, 3, 3)) -> Run:
    """Checkpoint 10 of seed 0, and the best weights, of step 5, of seed 1; `text` in place of the description."""
    run = Run.create(path, "prior", {"data": {"data": "digits"}, "train": {"ema": 0.0}})
    for folder, step, seed in ((run.checkpoints, 10, 0), (run.best, 5, 1)):

        def write(path: Path, seed: int = seed) -> None:
            write_prior(path, prior(seed), tokenizer(levels))
            (path / "model.json").write_text(text or prior(seed).text)
            save_file(prior(seed).state_dict(), path / "model.safetensors")

        checkpoints.save(folder, step, write)
    return run


def test_a_run_has_its_best_prior_and_its_tokenizer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found, newest = load_prior(run.path), load_prior(Path(f"{run.path}@10"))
    assert (found.weights, newest.weights) == ("newest, step 5, the best in validation", "newest, step 10")
    for trained, seed in ((found, 1), (newest, 0)):
        assert trained.hash == trained.prior.hash == prior(seed).hash
        assert trained.prior.config == prior().config and trained.prior.layout == prior().layout
        assert (trained.prior.classes, trained.prior.empty, trained.prior.class_names) == (3, (1,), ("a", "b", "c"))
        assert not trained.prior.training and not any(p.requires_grad for p in trained.prior.parameters())
    assert found.data.data == "digits"
    ours, theirs = found.tokenizer.state_dict(), tokenizer().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_damage_and_another_tokenizer_are_named(tmp_path: Path) -> None:
    good = json.loads(prior().text)
    bad = {
        "model.json cannot be used": {**good, "layout": {**good["layout"], "grids": []}},
        "do not fit": {**good, "config": {**good["config"], "width": 32}},
        "unknown key 'more'": {**good, "more": 1},
    }
    for i, (words, found) in enumerate(bad.items()):
        with pytest.raises(DataError, match=words):
            load_prior(make_run(tmp_path / str(i), json.dumps(found)).path)
    with pytest.raises(DataError, match="its tokenizer has codes"):
        load_prior(make_run(tmp_path / "other", levels=(4, 4)).path)
    with pytest.raises(DataError, match="tokenizer"):
        load_prior(Run.create(tmp_path / "tokenizer", "tokenizer", {}).path)


def test_a_folder_of_one_kind_is_not_read_as_the_other(tmp_path: Path) -> None:
    prior().save_pretrained(tmp_path / "model", tokenizer=tokenizer())
    assert ImageTokenizer.from_pretrained(tmp_path / "model" / "tokenizer").latent_shape == (3, 4, 4)
    assert Prior.from_pretrained(tmp_path).hash == prior().hash
    with pytest.raises(ValueError, match=r"masked prior, which Prior\.from_pretrained loads"):
        CausalPrior.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a prior is saved with its tokenizer alone, without speed"):
        prior().save_pretrained(tmp_path / "b", speed=1)
