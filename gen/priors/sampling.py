"""Codes of a prior by seed: one integer per image fixes its class and every draw, so an image depends on neither batch size,
process count nor device.

What is counted, at the trunk, where it happens:

    NFE                  samples that go through it, per image; guidance doubles it
    token-evaluations    tokens of those samples, the class among them: with its cache a causal prior takes one token an
                         evaluation, L in all, and a masked one all L + 1 in each of S
"""

import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from midway.gen.core.config import to_dict
from midway.gen.core.files import state_hash
from midway.gen.data.images import to_float, to_uint8
from midway.gen.data.pixels import Images
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.sampling import drawn, labels_of
from midway.gen.priors.blocks import Trunk
from midway.gen.priors.continuous import ContinuousPrior, own_sampler
from midway.gen.priors.decoding import Decoding, Prompt, begun
from midway.gen.priors.draws import SeededDraws
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.prior import CodePrior, Prior
from midway.gen.tokenizer.codes import all_codes
from midway.samplers.sample import ForwardCounter
from midway.samplers.sampler import Sampler
from midway.tokenizers.memory import images_at_once


@dataclass(frozen=True)
class CodeSamples:
    """Tokens int64 (N, L, D) on the CPU, whether their laws were finite, bool (N,), evaluations of one, seconds of all.

    Of a continuous prior tokens are float32 (N, L, C), and head_nfe evaluations of its head were made for each of them.
    """

    tokens: Tensor
    finite: Tensor
    nfe: float
    token_evaluations: float
    seconds: float
    head_nfe: float = 0.0


@dataclass(frozen=True)
class CodeSampling:
    """How codes are drawn; batch size changes nothing beyond the rounding of the trunk."""

    decoding: Decoding
    batch_size: int = 256
    precision: Literal["no", "bf16"] = "no"
    """bf16: the trunk runs under autocast; laws are float32, and drawn from in float64."""
    draw: ClassDraw | None = None
    """How seeds draw their classes; None: in turn."""
    head: Sampler | None = None
    """Of a continuous prior, what its tokens are drawn by; None: `own_sampler`."""
    prompt: Prompt | None = None
    """Tokens that are given: of seed s those of image s mod N."""

    def left(self, length: int) -> int:
        """How many of `length` tokens are drawn."""
        return length if self.prompt is None else self.prompt.left


class TrunkCounter:
    """Counts samples and tokens that go through a trunk while the `with` block lasts, and sees whose outputs are finite."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk, self.evaluations, self.tokens, self._finite = trunk, 0, 0, list[Tensor]()

    def __enter__(self) -> "TrunkCounter":
        self._hook = self.trunk.register_forward_hook(self._see)
        step = self.trunk.step

        def counted(x: Tensor, *arguments: Any) -> Tensor:
            self._count(x, output := step(x, *arguments))
            return output

        self.trunk.__dict__["step"] = counted  # no call of the module, so no hook sees it
        return self

    def _see(self, trunk: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self._count(arguments[0], output)

    def _count(self, x: Tensor, output: Tensor) -> None:
        self.evaluations += x.shape[0]
        self.tokens += x.shape[0] * x.shape[1]
        self._finite.append(output.isfinite().flatten(1).all(1))

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        del self.trunk.__dict__["step"]

    def finite(self, batch: int) -> Tensor:
        """bool (batch,) on the CPU, of samples that went through in copies of a whole batch."""
        return torch.cat(self._finite).view(-1, batch).all(0).cpu()


@torch.no_grad()
def code_batches(
    trained: TrainedPrior, batches: Iterable[tuple[Tensor, Tensor]], config: CodeSampling
) -> Iterator[CodeSamples]:
    """The samples of each batch of seeds (B,) and labels (B,), drawn one batch at a time. ValueError as of `Prior.draw`."""
    prior = trained.prior
    device = next(prior.parameters()).device
    for seeds, labels in batches:
        before = time.perf_counter()
        with (
            TrunkCounter(prior.trunk) as counter,
            ForwardCounter(*([prior.head] if isinstance(prior, ContinuousPrior) else [])) as head,
            torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", UserWarning)  # `draw_warnings` has them, once
            tokens = _drawn(prior, labels.to(device), SeededDraws(seeds.cpu()), config).cpu()
        finite = counter.finite(len(seeds)) & tokens.isfinite().flatten(1).all(1)
        nfe, passed = counter.evaluations / len(seeds), counter.tokens / len(seeds)
        head_nfe = head.evaluations / len(seeds) / config.left(prior.layout.length)
        yield CodeSamples(tokens, finite, nfe, passed, time.perf_counter() - before, head_nfe)


def _drawn(prior: Prior, labels: Tensor, draws: SeededDraws, config: CodeSampling) -> Tensor:
    prompt = None if config.prompt is None else config.prompt.of(draws.seeds)
    if isinstance(prior, ContinuousPrior):
        return prior.draw(labels, draws, config.decoding, config.head, prompt)
    assert isinstance(prior, CodePrior)
    return prior.draw(labels, draws, config.decoding, prompt)


def sample_codes(
    trained: TrainedPrior, seeds: Tensor, config: CodeSampling, labels: Tensor | None = None
) -> CodeSamples:
    """The tokens of one image for each seed (N,); `labels` (N,) override the seeds' own classes."""
    prior = trained.prior
    labels = labels_of(seeds, prior.classes, prior.empty, config.draw) if labels is None else labels
    batches = zip(seeds.split(config.batch_size), labels.split(config.batch_size), strict=True)
    parts = list(code_batches(trained, batches, config))
    nfe, passed = (
        sum(round(getattr(part, name) * len(part.tokens)) for part in parts) / len(seeds)
        for name in ("nfe", "token_evaluations")
    )
    head = sum(part.head_nfe * len(part.tokens) for part in parts) / len(seeds)
    tokens, finite = torch.cat([part.tokens for part in parts]), torch.cat([part.finite for part in parts])
    return CodeSamples(tokens, finite, nfe, passed, sum(part.seconds for part in parts), head)


@torch.no_grad()
def decode_codes(trained: TrainedPrior, tokens: Tensor) -> Tensor:
    """Tokens (N, L, *), whole numbers or latents -> uint8 images (N, C, H, W) on the CPU, as many at once as fit."""
    tokenizer, layout = trained.tokenizer, trained.prior.layout
    if isinstance(layout, CodeLayout):
        decoded, values = tokenizer.decode_indices, layout.indices(tokens.long())
    else:
        decoded, values = tokenizer.decode_latents, layout.latents(tokens.float())
    parts = values.split(images_at_once(tokenizer))
    return torch.cat([to_uint8(decoded(part.to(tokenizer.device))).cpu() for part in parts])


@torch.no_grad()
def encode_codes(trained: TrainedPrior, images: Images) -> Tensor:
    """uint8 images (N, C, H, W) -> tokens (N, L, *) on the CPU, whole numbers or latents. DivergedError as of `all_codes`."""
    tokenizer, layout = trained.tokenizer, trained.prior.layout
    if isinstance(layout, CodeLayout):
        return layout.tokens(all_codes(tokenizer, images))
    parts = images.split(images_at_once(tokenizer))
    return layout.tokens(
        torch.cat([tokenizer.encode_latents(to_float(part.to(tokenizer.device))).cpu() for part in parts])
    )


def settled(decoding: Decoding, length: int) -> Decoding:
    """The same way to draw `length` tokens, without what it does not read: equal ones draw the same."""
    steps = decoding.steps or length
    ordered = decoding.rule != "causal" and 1 < steps < length
    return replace(
        decoding,
        steps=steps,
        decay=decoding.decay if ordered else "cosine",
        ramp=decoding.ramp if decoding.guidance != 1 else 0.0,
        choice_noise=decoding.choice_noise if decoding.rule == "maskgit" else 0.0,
    )


def _head_of(prior: ContinuousPrior, config: CodeSampling) -> Sampler:
    return config.head or own_sampler(prior.head.schedule)


def identity_of(trained: TrainedPrior, config: CodeSampling) -> dict[str, Any]:
    """All that the images of seeds depend on, as JSON takes it."""
    tiles = trained.tokenizer.tiles
    tiled = {} if tiles is None else {"tiles": list(tiles)}
    return (
        {
            "prior": trained.hash,
            "decoder": trained.decoder_hash,
            "decoding": to_dict(settled(config.decoding, config.left(trained.prior.layout.length))),
            "precision": config.precision,
        }
        | ({} if not isinstance(trained.prior, ContinuousPrior) else {"head": _head_of(trained.prior, config).hash})
        | ({} if config.prompt is None else {"prompt": prompt_hash(config.prompt)})
        | tiled
        | drawn(config.draw)
    )


def prompt_hash(prompt: Prompt) -> str:
    """12 hexadecimal digits of what is read of it."""
    tokens, known = begun(torch.zeros_like(prompt.tokens), prompt)
    return state_hash("prompt", {"tokens": tokens, "known": known})
