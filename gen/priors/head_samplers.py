"""What samples the tokens of a continuous prior: solvers by name, and tables learned for its diffusion head.

A table is learned as for a latent model (gen/distillation/table.py), in place of labels by hidden vectors of the trunk: training
images, places of which are masked as in training, and of each the vector of one masked place. It is stored with the prior's run,
solvers/table-<grid>-nfe<k>/, and costs head evaluations alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.errors import UsageError, nearest
from midway.gen.core.runs import Run
from midway.gen.data.images import to_float
from midway.gen.data.pixels import Images
from midway.gen.diffusion.load import BEST, TABLE, load_solver
from midway.gen.diffusion.samplers import SamplerConfig, build_table
from midway.gen.priors.continuous import ContinuousPrior
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.masked import random_masks
from midway.gen.priors.token_head import TokenHead
from midway.gen.training.batches import Context
from midway.samplers.grids import NAMED
from midway.samplers.sampler import Sampler
from midway.samplers.solvers import SOLVERS
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.tokenizer import ImageTokenizer

NO_STEP = -1
"""Of the masks that solvers are learned with: no step of a training."""


@dataclass(frozen=True)
class TrainedHead:
    """The head of a trained prior, in place of a `TrainedModel` where solvers are learned and loaded."""

    model: TokenHead
    prior: TrainedPrior
    tokenizer: ImageTokenizer
    hash: str
    """Of the whole prior."""
    run: Run


def head_of(trained: TrainedPrior) -> TrainedHead:
    """UsageError for a prior over codes."""
    prior = trained.prior
    if not isinstance(prior, ContinuousPrior):
        why = f"it is a {prior.config.kind} prior over codes, which are drawn without a solver"
        raise UsageError(f"a solver for {trained.run.place}", why, "give a continuous prior, or a latent model")
    return TrainedHead(prior.head, trained, trained.tokenizer, trained.hash, trained.run)


def head_sampler(trained: TrainedPrior, solver: str, grid: str, nfe: int, guidance: float = 1.0) -> Sampler:
    """Of `nfe` evaluations a token: a solver of SOLVERS on a named grid, or the table learned on it, or on any.

    UsageError for names and budgets that do not exist, and a table that was not learned, or at another guidance.
    """
    head = head_of(trained)
    if solver == TABLE:
        return _learned(head, grid, nfe, guidance)
    for flag, name, known in (("--head-solver", solver, [*SOLVERS, TABLE]), ("--head-grid", grid, [*NAMED])):
        if name not in known:
            raise UsageError(f"{flag} {name}", "the head of a continuous prior has no such one", nearest(name, known))
    return build_table(head.model.schedule, solver, nfe, SamplerConfig(), grid)


def _learned(head: TrainedHead, grid: str, nfe: int, guidance: float) -> Sampler:
    found = [load_solver(head, TABLE, name, nfe) for name in dict.fromkeys((grid, BEST, *NAMED))]
    learned = next((each for each in found if each is not None), None)
    again = f"midway train solver table --model {head.run.place} --nfe {nfe} --guidance {guidance:g}"
    if learned is None:
        why = "a learned table belongs to one prior and budget"
        raise UsageError(f"no table at head NFE {nfe} was learned for {head.run.path}", why, again)
    assert learned.card is not None
    if learned.card.guidance != guidance:
        why = f"it was learned at guidance {learned.card.guidance:g}, and this is guidance {guidance:g}"
        raise UsageError(f"the table at head NFE {nfe} of {head.run.path}", why, f"{again} --overwrite")
    return learned


@torch.no_grad()
def hidden_vectors(
    trained: TrainedPrior, images: Images, labels: Tensor, first: int, count: int, guided: bool
) -> Tensor:
    """Numbers `first` on of what tables are learned with: hidden vectors (count, W), (count, 2, W) with the class and without.

    images uint8 (N, C, H, W) and their labels int64 (N,), in an order of their own; results are on the prior's device.
    """
    prior, tokenizer = trained.prior, trained.tokenizer
    assert isinstance(prior, ContinuousPrior)
    device, numbers = next(prior.parameters()).device, torch.arange(first, first + count)
    order = randomness.permutation(0, "head", 0, len(images))
    found = []
    for some in numbers.split(images_at_once(tokenizer)):
        items = order[some % len(images)]
        tokens = prior.layout.tokens(tokenizer.encode_latents(to_float(images[items].to(tokenizer.device))).to(device))
        masked, places = random_masks(prior.layout.length, Context(0, NO_STEP, some))
        known = (places.argsort(-1) >= masked[:, None]).to(device)
        classes, one = prior.given(labels[items].to(device)), places[:, 0].to(device)
        both = [classes, prior.null_labels(classes)] if guided else [classes]
        rows = [prior.hidden(tokens, known, each)[torch.arange(len(some), device=device), one] for each in both]
        found.append(torch.stack(rows, 1) if guided else rows[0])
    return torch.cat(found)
