"""Bits of codes in midway evaluate-likelihood: of priors alone, in a table of their own, beside bits per dimension."""

import json
import math
from pathlib import Path

import pytest
import torch
from pipelines import Pipeline, Script
from prior_runs import open_prior, prior_run

from midway.gen.data.splits import load_splits
from midway.gen.features.reference import balanced_subject
from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.sampling import encode_codes

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture(scope="module")
def report(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


def test_priors_have_bits_of_codes_and_of_nothing_else(pipeline: Pipeline, succeed: Script, report: Path) -> None:
    """Means over held-out images of the prior's own bits; fixed length and independent positions of the same codes."""
    causal = prior_run(pipeline.root / "scored-causal", pipeline.tokenizer)
    masked = prior_run(pipeline.root / "scored-masked", pipeline.tokenizer, kind="masked", conditional=False)
    models = f"{causal} {masked} {pipeline.model} {pipeline.baseline}"
    done = succeed(f"evaluate_likelihood --models {models} --features none --n 20 --iwae 0 --masks 8 --out {report}")
    rows = {row["name"]: row for row in json.loads((report / "results.json").read_text())["rows"]}
    scored = rows["scored-causal"], rows["scored-masked"]
    assert [row["kind"] for row in scored] == ["causal prior", "masked prior"]
    assert all(row["bits"] is None and row["error"] is None for row in scored)
    assert [row["code_bound"] for row in scored] == ["exact", "bound, 8 mask(s) an image"]
    assert [row["sample_nfe"] for row in scored] == [4, 4] and [row["sampler"] for row in scored] == [
        "causal",
        "halton",
    ]
    assert all(row["code_fixed"] == pytest.approx(4 * math.log2(1000)) and row["code_tokens"] == 4 for row in scored)
    trained = open_prior(causal)
    splits = load_splits(trained.data)
    subject = balanced_subject(splits.held_out, 20)
    assert isinstance(trained.prior, CausalPrior)
    tokens, train = (encode_codes(trained, images) for images in (subject.images, splits.train.images))
    bits = trained.prior.bits(tokens, subject.labels)
    assert scored[0]["code_bits"] == pytest.approx(bits.mean().item(), rel=1e-6)
    assert scored[0]["code_error"] == pytest.approx(bits.std().item() / math.sqrt(20), rel=1e-6)
    count = (train[:, None, :, 0] == tokens[None, :, :, 0]).sum(0) + 1
    alone = -(count / (len(train) + 1000)).double().log2().sum(1)
    assert all(row["code_independent"] == pytest.approx(alone.mean().item(), rel=1e-6) for row in scored)
    assert all(row["code_bits"] is None for name, row in rows.items() if not name.startswith("scored"))
    assert rows["baseline"]["bits"] is not None and torch.isfinite(bits).all()
    assert "Bits of the codes, which are no bits of pixels" in done.out


def test_they_never_stand_in_a_column_with_bits_per_dimension(report: Path) -> None:
    text, page = (report / "report.md").read_text(), (report / "report.html").read_text()
    first, _, rest = text.partition("## Bits of the codes")
    codes, _, notes = rest.partition("\n## ")
    heads = [line for line in first.splitlines() if line.startswith("| model |")]
    assert "bits/dim" in heads[0] and "bits per image" not in heads[0]
    (line,) = (line for line in first.splitlines() if line.startswith("| scored-causal |"))
    assert line.split("|")[2].strip() in ("–", "") and "exact" not in line
    assert "| prior | bits per image |" in codes and "baseline" not in codes and "not of pixels" in codes
    assert "Of the priors, " in first and "needs the fewest bits per image for the codes of tokenizer" in first
    assert "no bits of pixels" in notes and "Bits of the codes" in page
    names = [line.split("|")[1].strip() for line in codes.splitlines() if line.startswith("| scored")]
    assert sorted(names) == ["scored-causal", "scored-masked"]
