"""Samplers of a continuous prior's head: by name, learned, stored with the prior, and by seed."""

from pathlib import Path

import pytest
import torch
from pipelines import Pipeline, Script
from prior_runs import open_prior, prior_run

from midway.gen.core.errors import UsageError
from midway.gen.data.splits import load_splits
from midway.gen.distillation.learning import Lesson, learn
from midway.gen.distillation.table import TableConfig, TableObjective, TableTarget, fine_teacher
from midway.gen.priors.config import TokenHeadConfig
from midway.gen.priors.continuous import ContinuousPrior
from midway.gen.priors.decoding import Decoding
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.rules import head_of, head_sampler
from midway.gen.priors.sampling import CodeSampling, decode_codes, identity_of, sample_codes
from midway.gen.trainings.head_vectors import hidden_vectors
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.solvers import make_solver
from midway.samplers.table import Table

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = torch.arange(5, 16)
HEAD = TokenHeadConfig(width=16, depth=1)


@pytest.fixture(scope="module")
def run(pipeline: Pipeline) -> Path:
    return prior_run(pipeline.root / "continuous-prior", pipeline.tokenizer, kind="continuous", head=HEAD)


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedPrior:
    return open_prior(run)


def vectors(trained: TrainedPrior, first: int, count: int, guided: bool = False) -> torch.Tensor:
    train = load_splits(trained.data).train
    return hidden_vectors(trained, train.images, train.labels, first, count, guided)


def test_images_depend_on_their_seeds_and_evaluations_are_counted(trained: TrainedPrior) -> None:
    """Of the trunk per image, of the head per token, each doubled by guidance."""
    head = head_sampler(trained, "dpmpp2m_sde", "karras", 3)
    for guidance in (1.0, 2.0):
        how = CodeSampling(Decoding("halton", 2, guidance=guidance), head=head)
        found = sample_codes(trained, SEEDS, how)
        assert found.tokens.shape == (11, 4, trained.tokenizer.latent_shape[0]) and found.finite.all()
        assert (found.nfe, found.token_evaluations, found.head_nfe) == tuple(
            (1 + (guidance > 1)) * n for n in (2, 10, 3)
        )
        some = sample_codes(trained, SEEDS[[7, 2]], CodeSampling(how.decoding, batch_size=1, head=head))
        torch.testing.assert_close(some.tokens, found.tokens[[7, 2]], atol=1e-4, rtol=1e-4)
    images = decode_codes(trained, found.tokens)
    assert images.dtype == torch.uint8 and len(images) == 11


def test_other_samplers_are_other_samples_of_the_same_name_or_not(trained: TrainedPrior) -> None:
    """What the images depend on has the head's sampler, also where it is the prior's own."""
    own, how = identity_of(trained, CodeSampling(Decoding("halton", 2))), Decoding("halton", 2)
    assert (
        own["head"]
        == identity_of(trained, CodeSampling(how, head=head_sampler(trained, "dpmpp2m", "karras", 20)))["head"]
    )
    assert (
        own["head"]
        != identity_of(trained, CodeSampling(how, head=head_sampler(trained, "dpmpp2m", "karras", 5)))["head"]
    )


def test_hidden_vectors_are_those_of_numbers(trained: TrainedPrior) -> None:
    """Whatever the others are; the first of a pair is the one with the class."""
    found = vectors(trained, 0, 9)
    assert found.shape == (9, 16) and len(found.unique(dim=0)) == 9
    torch.testing.assert_close(vectors(trained, 4, 5), found[4:], atol=1e-5, rtol=1e-5)
    pairs = vectors(trained, 0, 9, guided=True)
    torch.testing.assert_close(pairs[:, 0], found, atol=1e-5, rtol=1e-5)
    assert (pairs[:, 1] - found).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_learned_table_is_nearer_to_the_teacher_than_where_it_began(trained: TrainedPrior, guidance: float) -> None:
    """On tokens that it was not learned with; the counter has the passes through the head."""
    config = TableConfig(teacher_steps=12, pairs=64)
    head = head_of(trained).model
    objective = TableObjective(head, TableTarget(2, "logsnr", guidance), config)
    begun = objective.learned.table()
    hidden = vectors(trained, 0, 64, guidance != 1)
    with ForwardCounter(head) as counter:
        take = objective.prepare(hidden, {})
        learn(objective, take, 64, Lesson(steps=30, batch=16, lr=5e-3, clip=1.0))
    assert objective.counter.evaluations == counter.evaluations == (64 * 12 + 30 * 16 * 2) * (1 + (guidance != 1))
    labels = vectors(trained, 64, 64, guidance != 1)
    teacher = fine_teacher(head, config)
    x = objective.starts(64, labels, teacher.grid[0])
    with torch.no_grad():
        exact = sample(head.field(labels, guidance), teacher, x)
        before, after = (
            float((sample(head.field(labels, guidance), table, x) - exact).square().mean())
            for table in (begun, objective.learned.table())
        )
    assert after < 0.8 * before


def test_a_table_is_learned_and_found_with_the_prior(run: Path, succeed: Script, script: Script) -> None:
    """midway train solver table --model PRIOR; other solvers and other priors have errors that name what works."""
    flags = "--nfe 2,3 --steps 3 --batch-size 8 --table.pairs 16 --table.teacher-steps 4"
    with pytest.raises(UsageError, match="train solver table"):
        head_sampler(open_prior(run), "table", "karras", 2)
    done = succeed(f"train_solver table --model {run} {flags}")
    assert "table at NFE 3" in done.out and (run / "solvers" / "table-best-nfe2" / "solver" / "README.md").exists()
    trained = open_prior(run)
    found = head_sampler(trained, "table", "karras", 2)
    assert (
        isinstance(found, Table) and found.nfe == 2 and found.card is not None and found.card.model_hash == trained.hash
    )
    samples = sample_codes(trained, SEEDS, CodeSampling(Decoding("random", 4), head=found))
    assert samples.head_nfe == 2 and samples.nfe == 4
    with pytest.raises(UsageError, match="learned at guidance 1"):
        head_sampler(trained, "table", "karras", 2, guidance=2.0)
    assert "only tables are learned" in script(*f"train_solver amed --model {run} --nfe 4".split()).err
    assert (
        "no images" in script(*f"train_solver table --model {run} {flags} --table.loss lpips --overwrite".split()).err
    )


def test_codes_have_no_head(pipeline: Pipeline, script: Script) -> None:
    masked = prior_run(pipeline.root / "masked-without-head", pipeline.tokenizer, kind="masked")
    done = script(*f"train_solver table --model {masked} --nfe 2".split())
    assert done.code == 2 and "masked prior over codes" in done.err and "Traceback" not in done.err
    with pytest.raises(UsageError, match="continuous prior"):
        head_sampler(open_prior(masked), "euler", "karras", 2)


@pytest.mark.parametrize(
    ("solver", "grid", "nfe"), [("eulr", "karras", 3), ("euler", "gits", 3), ("heun", "karras", 3)]
)
def test_names_and_budgets_that_do_not_exist(trained: TrainedPrior, solver: str, grid: str, nfe: int) -> None:
    with pytest.raises(UsageError):
        head_sampler(trained, solver, grid, nfe)


def test_the_own_sampler_is_that_of_a_prior(trained: TrainedPrior) -> None:
    prior = trained.prior
    assert isinstance(prior, ContinuousPrior)
    found = sample_codes(trained, SEEDS, CodeSampling(Decoding("halton", 2)))
    named = sample_codes(
        trained, SEEDS, CodeSampling(Decoding("halton", 2), head=make_solver("dpmpp2m", prior.head.schedule, 20))
    )
    assert torch.equal(found.tokens, named.tokens) and found.head_nfe == 20
