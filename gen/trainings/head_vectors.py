"""What tables for the head of a continuous prior are learned with (gen/distillation/table.py).

In place of labels: hidden vectors of the trunk, for training images of which places are masked as in training, each that of one
masked place. A table costs evaluations of the head alone.
"""

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.data.images import to_float
from midway.gen.data.pixels import Images
from midway.gen.priors.continuous import ContinuousPrior
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.masked import random_masks
from midway.gen.training.batches import Context
from midway.tokenizers.memory import images_at_once

NO_STEP = -1
"""Of the masks that solvers are learned with: no step of a training."""


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
