"""Adversarial losses: a discriminator D learns to distinguish images x from reconstructions x', the decoder to prevent it.

    kind              discriminator                                     generator
    "hinge"           1/2 E relu(1 - D(x)) + 1/2 E relu(1 + D(x'))      -E D(x')             (Lim & Ye 2017, arXiv 1705.02894)
    "non_saturating"  E softplus(-D(x)) + E softplus(D(x'))             E softplus(-D(x'))   (Goodfellow et al. 2014, sec. 3)
    "wasserstein"     E D(x') - E D(x), with a penalty                  -E D(x')             (Arjovsky et al. 2017)

E is the mean over images and patches. The 1/2 of the hinge loss is as in VQGAN (Esser et al. 2021, arXiv 2012.09841).

Penalties for the discriminator:

    R1         1/2 E |grad_x D(x)|^2                                     (Mescheder et al. 2018, arXiv 1801.04406, eq. 9)
    gradient   E (|grad D(m x + (1 - m) x')| - 1)^2,  m in (0, 1)        (Gulrajani et al. 2017, arXiv 1704.00028, eq. 3)
    LeCam      E relu(D(x) - a')^2 + E relu(a - D(x'))^2                 (Tseng et al. 2021, arXiv 2104.03310, eq. 4)

In the first two D(x) is the *mean* of an image's logits and |.|^2 the sum over its pixels: the losses above see that mean, and of
the sum the gradient would grow with the number of patches, so that one penalty weight would not serve two image sizes. In the
last a and a' are running means of D(x) and D(x') (`LeCamAverages`); relu is of the authors' code, the equation has plain squares.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.base import distributed, float32_island
from midway.tokenizers.losses import mean

Kind = Literal["hinge", "non_saturating", "wasserstein"]
Discriminator = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) -> logits (B, 1, h, w)."""


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: Kind) -> Tensor:
    """Scalar float32; the fake logits are of reconstructions without a gradient. ValueError for another kind."""
    real, fake = real_logits.float(), fake_logits.float()
    if _checked(kind) == "hinge":
        return (mean(F.relu(1 - real)) + mean(F.relu(1 + fake))) / 2
    if kind == "non_saturating":
        return mean(F.softplus(-real)) + mean(F.softplus(fake))
    return mean(fake) - mean(real)


def generator_loss(fake_logits: Tensor, kind: Kind) -> Tensor:
    """Scalar float32, falling as the logits rise; they come from a `frozen` discriminator. ValueError for another kind."""
    fake = fake_logits.float()
    return mean(F.softplus(-fake)) if _checked(kind) == "non_saturating" else -mean(fake)


def _checked(kind: Kind) -> Kind:
    if kind not in get_args(Kind):
        raise ValueError(f"the adversarial loss is {kind!r}; choose one of: {', '.join(get_args(Kind))}")
    return kind


def frozen(module: nn.Module) -> Discriminator:
    """`module` with its parameters held constant: only the input has a gradient. Buffers are used as they are.

    With it for the generator's loss, and the module itself on reconstructions without a gradient, one backward pass of the sum
    of both losses gives each network the gradient of its own loss alone.
    """
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda images: torch.func.functional_call(module, constants, (images,))


# ---- penalties ----


def r1_penalty(discriminator: Discriminator, real: Tensor) -> Tensor:
    """Scalar float32 with a gradient to the discriminator, whatever the autocast; real images (B, C, H, W)."""
    return mean(_image_gradient(discriminator, real).square().sum(1)) / 2


def gradient_penalty(discriminator: Discriminator, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Scalar float32, as `r1_penalty`, at mix real + (1 - mix) fake; real, fake (B, C, H, W), mix (B,) uniform in (0, 1).

    Where the gradient is 0 the penalty is 1, without a gradient of its own. ValueError for shapes that do not fit.
    """
    if real.shape != fake.shape or mix.shape != real.shape[:1]:
        raise ValueError(
            f"real {tuple(real.shape)}, fake {tuple(fake.shape)}, mix {tuple(mix.shape)}: give images of one shape "
            "and one number for each"
        )
    points = fake.float().lerp(real.float(), mix.float().view(-1, 1, 1, 1))
    norms = torch.linalg.vector_norm(_image_gradient(discriminator, points), dim=1)
    return mean((norms - 1).square())


def _image_gradient(discriminator: Discriminator, images: Tensor) -> Tensor:
    """The gradient (B, C H W) of each image's mean logit, float32 and differentiable."""
    points = images.detach().float().requires_grad_()
    with float32_island(points):
        logits = discriminator(points).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(logits.sum(), points, create_graph=True)
    return gradient.flatten(1)


def lecam(real_logits: Tensor, fake_logits: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """Scalar float32: real logits should not be above the fake ones' average (), nor fake ones below the real ones'."""
    above = mean(F.relu(real_logits.float() - fake_average).square())
    return above + mean(F.relu(real_average - fake_logits.float()).square())


# ---- running quantities ----


class LeCamAverages(nn.Module):
    """Running means of logits, `real` and `fake`, float32 () and in the checkpoint; 0 before the first `update`.

        a <- a + w (mean of the step - a),   w = (1 - d) / (1 - d^n) at the n-th update, d = decay

    which is the exponential mean without its bias to 0. `gather` adds the logits of a micro-batch, `update` applies those of all
    micro-batches and processes, once per optimizer step: the means are of the whole batch, however it is divided.
    """

    real: Tensor
    fake: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; give a number in (0, 1), 0.999 by default")
        self.decay = decay
        for name in ("real", "fake", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))
        # Sums and counts (2, 2) of real and fake. No buffer: DistributedDataParallel would overwrite it with rank 0's.
        self._pending: Tensor | None = None

    @torch.no_grad()
    def gather(self, real_logits: Tensor, fake_logits: Tensor) -> None:
        """Add a micro-batch's logits, any shapes; in evaluation mode nothing. Not to be called where autograd recomputes."""
        if not self.training:
            return
        both = [logits.detach().float() for logits in (real_logits, fake_logits)]
        new = torch.stack([torch.stack([x.sum(), x.new_tensor(x.numel())]) for x in both])
        self._pending = new if self._pending is None else self._pending + new

    @torch.no_grad()
    def update(self, step_ok: Tensor | None = None) -> None:
        """Once per optimizer step, on every process, whether anything was gathered or not.

        Discarded if `step_ok`, a bool (), is False, if a sum is not finite or if there were no logits.
        """
        if self._pending is None and not distributed():
            return
        pending = self.real.new_zeros(2, 2) if self._pending is None else self._pending
        self._pending = None
        sums, counts = _over_ranks(pending).unbind(1)
        learned = sums.isfinite().all() & (counts > 0).all() & (step_ok if step_ok is not None else True)
        self.updates += learned
        forgotten = -torch.expm1(self.updates.clamp(min=1) * math.log(self.decay))  # 1 - d^n without cancellation
        weight = learned * (1 - self.decay) / forgotten
        for average, new in zip((self.real, self.fake), torch.where(learned, sums / counts, 0), strict=True):
            average.lerp_(new, weight)


class AdaptiveWeight(nn.Module):
    """VQGAN's weight of the generator's loss (Esser et al. 2021, arXiv 2012.09841, eq. 7).

        value = |grad_L reconstruction loss| / (|grad_L generator loss| + 1e-6), in [0, 1e4],   L = the decoder's last layer

    `measure` adds a micro-batch's gradients, `update` makes the value of the *next* step from those of all micro-batches and
    processes: `value`, float32 () and in the checkpoint, 0 until the first update. The ratio of one micro-batch on one process
    would make the loss depend on how the batch is divided, and the ratio of the whole batch is known only after its last part.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros((), dtype=torch.float32))
        # Both gradients and the weight. Empty between steps, so not in the checkpoint; no buffer, see LeCamAverages.
        self._pending: Tensor | None = None

    def measure(self, reconstruction_loss: Tensor, generator_loss: Tensor, last: Tensor, weight: float = 1.0) -> None:
        """Add the gradients with respect to `last` of two losses, unweighted means over a micro-batch; the graph is kept.

        `weight` is the micro-batch's share of the step; it matters if shares differ. Where one process measures, all must.
        """
        gradients = [
            torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction_loss, generator_loss)
        ]
        with torch.no_grad():
            both = torch.cat([gradient.flatten().float() for gradient in gradients])
            new = weight * torch.cat([both, both.new_ones(1)])
            self._pending = new if self._pending is None else self._pending + new

    @torch.no_grad()
    def update(self, step_ok: Tensor | None = None) -> None:
        """Once per optimizer step, on every process; nothing changes if nothing was measured.

        Discarded if `step_ok`, a bool (), is False, or if a gradient is not finite.
        """
        if self._pending is None:
            return
        sums, self._pending = _over_ranks(self._pending), None
        norms = (sums[:-1] / sums[-1]).view(2, -1).norm(dim=1)
        ratio = (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)
        learned = norms.isfinite().all() & (step_ok if step_ok is not None else True)
        self.value.copy_(torch.where(learned, ratio, self.value))


def _over_ranks(sums: Tensor) -> Tensor:
    if distributed():
        dist.all_reduce(sums)
    return sums
