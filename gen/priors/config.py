"""What a prior over codes is built from."""

from dataclasses import dataclass, field
from typing import Literal

from midway.gen.core.checkpoints import recorded_run
from midway.gen.core.config import RECORDED_AS
from midway.gen.core.ranges import COUNT, EVENTS, LAYERS, POSITIVE, SHARE, STEPS, WIDTH, check_ranges
from midway.samplers.prediction import Target
from midway.samplers.schedule import SCHEDULES, Schedule

Kind = Literal["causal", "masked", "continuous"]


@dataclass(frozen=True)
class TokenHeadConfig:
    """Process and size of the small diffusion model of one continuous token."""

    width: int = 256
    """Channels of its hidden layers."""
    depth: int = 3
    """Residual blocks."""
    schedule: Literal["linear", "cosine", "vp", "edm"] = "linear"
    """Process from a token to noise, as of a latent model."""
    target: Target = "velocity"
    """What the head predicts."""
    time_mean: float = 0.0
    """Mean of log rho, by whose normal law noise levels are drawn in training."""
    time_std: float = 1.0
    """Standard deviation of log rho."""
    repeats: int = 4
    """Noise levels that a training step draws for an image, as a multiple of its tokens; they are spread evenly over those that
    are missing."""

    def __post_init__(self) -> None:
        check_ranges(self, width=WIDTH, depth=LAYERS, time_mean=(-100, 100), time_std=POSITIVE, repeats=(1, 1000))

    def make_schedule(self) -> Schedule:
        """The schedule this names."""
        return SCHEDULES[self.schedule]()


@dataclass(frozen=True)
class PriorConfig:
    """Kind and size of a prior."""

    kind: Kind = "causal"
    """causal: one token after the other, with exact bits. masked: all that are missing at once, in any number of evaluations.
    continuous: latents themselves in place of codes, a token's by a small diffusion model given the others."""
    split: Literal["auto", "joint", "digits"] = "auto"
    """How the code of a position is predicted: by one softmax (joint), or digit by digit (fsq and bits); auto: one softmax of at
    most 16,384 codes."""
    width: int = 128
    """Channels of a token."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.1
    """Share of each block's attention and MLP outputs that is set to 0 in training."""
    conditional: bool = True
    """Whether the class is an input of the model; an unconditional model learns the mixture of all."""
    label_dropout: float = 0.1
    """Share of samples trained without their class, for classifier-free guidance."""
    shuffle_steps: int = 0
    """causal: optimizer steps with tokens in random orders, for all samples in the first half of them, then for ever fewer; 0:
    always row by row."""
    start: Literal["codes", "random"] = "codes"
    """Start of the embeddings and logits of codes: linear images of the tokenizer's code vectors, by which codes that are near to
    one another have similar laws from the first step on, or random."""
    head: TokenHeadConfig = field(default_factory=TokenHeadConfig)
    """continuous: the diffusion model of a token."""

    def __post_init__(self) -> None:
        check_ranges(self, width=WIDTH, depth=LAYERS, heads=WIDTH, label_dropout=SHARE, shuffle_steps=EVENTS)
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width {self.width} with {self.heads} heads: heads of {self.width / self.heads:g} channels, and 2-D rotations "
                "need whole multiples of 4"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a number in [0, 1)")
        if self.kind != "causal" and self.shuffle_steps:
            raise ValueError(f"a {self.kind} prior is trained in every order: shuffle_steps is for causal ones")


@dataclass(frozen=True)
class PriorOnlineConfig:
    """Online evaluation of a prior, every `--measure-every` steps."""

    nfe: tuple[int, ...] = ()
    """Evaluations per image of a masked prior (default: a quarter of its tokens, and all); a causal one takes one a token."""
    n: int = 1000
    """Images of each budget, seeds 0 to n - 1."""
    features: str | None = field(default=None, metadata={RECORDED_AS: recorded_run})
    """Feature network, as in midway evaluate (default: effnet-lite0)."""

    def __post_init__(self) -> None:
        if self.n < 2 or min(self.nfe, default=1) < 1:
            raise ValueError(f"online evaluation of n {self.n} at NFE {self.nfe}: use n >= 2 and NFE >= 1")
        check_ranges(self, n=COUNT, nfe=STEPS)
