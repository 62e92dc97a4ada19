"""Vector quantization with a codebook that learns by gradient (van den Oord et al. 2017, arXiv 1711.00937, equation 3).

    loss = mean((sg[z] - e_k)^2) + beta mean((z - sg[e_k])^2)         "codebook", "commitment"; beta = 0.25

A code that no vector chooses gets no gradient of these, and stays dead. Restart: a code that was not chosen in the last
`restart_after` steps, in which at least 8 K vectors were seen (a code with an even share is missed by so many with probability
e^-8), moves to a recent encoder vector, the longest unused first.

The optimizer's momentum does not undo that. It is what is left of gradients at least `restart_after` steps old: of heavy-ball
momentum 0.9^100 < 3e-5, of Adam's at beta_1 = 0.95 less than 0.6 %, together a fraction of one learning rate. A smaller
`restart_after` gives that up. (With an entropy loss, which reaches all codes, it is more, but made of that gradient.) Weight
decay keeps drawing all codes towards 0; give the codebook none if it is strong.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from midway.tokenizers.base import Quantized
from midway.tokenizers.codebook import Gradient
from midway.tokenizers.data_codebook import DataCodebook, Init

_EVEN_SHARES = 8


class GradientVQ(DataCodebook):
    """`codebook_size` codes of `dim` channels, a parameter of the optimizer, `codebook` (K, D).

    `update` restarts dead codes (`restart_after` = 0: never); it must follow the optimizer's step. Buffers in the checkpoint:
    `idle_steps` (K,) and `idle_vectors` (K,) int64, steps and vectors since each code was chosen, and `step`. Start and restart
    write to the parameter in place, which a sharded one (FSDP) does not allow: ValueError from `update`. For `normalize`,
    `gradient`, `entropy_weight` and `entropy_temperature` see codebook.py; with `normalize` the parameter has any length, and is
    normalised on reading.
    """

    learns_by_gradient = True
    idle_steps: Tensor
    idle_vectors: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float = 0.25,
        init: Init = "kmeans",
        restart_after: int = 100,
        seed: int = 0,
        normalize: bool = False,
        gradient: Gradient = "straight_through",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        if restart_after < 0:
            raise ValueError(
                f"restart_after is {restart_after}; give a number of steps >= 0, 100 by default, 0 for never"
            )
        super().__init__(codebook_size, dim, commitment, normalize, gradient, entropy_weight, entropy_temperature)
        self.restart_after = restart_after
        self.noise_channels = 1 if restart_after else 0
        self.codebook = nn.Parameter(self._first_codes(init, seed))
        self.register_buffer("idle_steps", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("idle_vectors", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("step", torch.tensor(-1))

    def observe(self, quantized: Quantized) -> None:
        if self.restart_after:
            super().observe(quantized)

    def update(self, step_ok: Tensor | None = None) -> None:
        if isinstance(self.codebook, DTensor):
            raise ValueError(
                "the codebook of GradientVQ is sharded, and start and restarts write to it in place: keep the quantizer out of "
                "FSDP, or use VQ or SimVQ"
            )
        if self.restart_after:
            super().update(step_ok)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, restart_after={self.restart_after}"

    def _begin(self) -> None:
        self.idle_steps.zero_()
        self.idle_vectors.zero_()

    def _learn(self, sums: Tensor, candidates: Tensor, learned: Tensor) -> None:
        """Count idleness, and move dead codes to the candidates."""
        hits = sums[:, -1]
        idle_steps = torch.where(hits > 0, 0, self.idle_steps + 1)
        idle_vectors = torch.where(hits > 0, 0, self.idle_vectors + hits.sum().long())
        longest = idle_vectors.argsort(descending=True, stable=True)[: len(candidates)]
        dead = (idle_steps >= self.restart_after) & (idle_vectors >= _EVEN_SHARES * self._size)
        moved = learned & dead[longest] & (candidates[:, -1] >= 0)
        self.codebook[longest] = torch.where(moved.unsqueeze(1), candidates[:, :-1], self.codebook[longest])
        for buffer, value in ((self.idle_steps, idle_steps), (self.idle_vectors, idle_vectors)):
            value[longest] = torch.where(moved, 0, value[longest])
            buffer.copy_(torch.where(learned, value, buffer))
