"""Sections of a report on a model, beyond its distances."""

import pytest
import torch
from pipelines import Pipeline

from midway.gen.data.splits import load_splits
from midway.gen.diffusion.sampling import SamplingConfig
from midway.gen.report import sections
from midway.gen.report.sections import code_section, trajectory_section
from midway.gen.sweep.trajectories import random_walk


def test_the_shape_of_the_trajectories_stands_beside_a_random_walks(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "SEEDS", 10)
    monkeypatch.setattr(sections, "STEPS", 8)
    section = trajectory_section(pipeline.load(), SamplingConfig())
    assert "10 trajectories" in section.text and f"{100 * random_walk(8)[:2].sum():.0f} %" in section.text
    (drawing,) = section.drawings
    assert drawing.png().startswith(b"\x89PNG")
    assert all("of each trajectory" in drawing.svg(narrow) for narrow in (False, True))


@pytest.mark.parametrize("count", [50, 30])
def test_codes_of_images_and_of_their_latents_are_the_same(count: int, pipeline: Pipeline) -> None:
    trained = pipeline.load()
    images = load_splits(trained.data).held_out.images[:count]
    scaled = (images.float() / 127.5 - 1).to(trained.tokenizer.device)
    codes = code_section(trained, images, trained.tokenizer.encode_latents(scaled))
    assert codes is not None
    tokens, used = count * trained.tokenizer.tokens, trained.tokenizer.encode_indices(scaled).unique().numel()
    assert codes.text.count(f"{used:,} different ones") == 2, "the same images on both sides"
    assert f"in {tokens:,} tokens of {count}" in codes.text


def test_latents_without_codes_have_no_section(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = pipeline.load()
    monkeypatch.setattr(trained.tokenizer.quantizer, "codebook_size", None)
    assert code_section(trained, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 1, 1)) is None
