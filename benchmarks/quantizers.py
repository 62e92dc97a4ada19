"""What a quantizer costs: time and memory of a training step beside vector-quantize-pytorch and diffusers.

Both sides of a row begin with the same codebook, see the same encoder vectors, have the same decay, loss weights and
straight-through gradient, and do the same: forward, backward of a given gradient and of the loss, update of the codebook. Before
anything is timed, each does it once, and indices, codes, losses, gradients and the codebook afterwards have to agree; vectors
that are, up to rounding, as near to a second code are not drawn. Restarts are off, because no two libraries draw alike. How time
and memory are measured: common.py.

Not the same on both sides: only ours counts how often codes are used, and notes vectors to restart codes from; the logarithm in
LFQ's entropy is cut off at 1e-5 in vector-quantize-pytorch, so its gradients are not compared; and its residual quantizer hands
the encoder the gradient of the code once a stage, ours once, so neither are those.

    python benchmarks/quantizers.py --out benchmarks/results/quantizers.json
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.environment import version_of
from midway.tokenizers import nearest_kernel
from midway.tokenizers.base import Quantizer, histogram
from midway.tokenizers.clustering import full_precision, nearest_code, rows_per_chunk
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.lfq import LFQ
from midway.tokenizers.quantizers import make_quantizer
from midway.tokenizers.simvq import SimVQ
from midway.tokenizers.vq import VQ

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Comparison, Measured, Step, conclude, measure, printed

Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""Of z (B, D, h, w) to codes of that shape, indices (B, h, w) and the weighted loss, None if there is none."""
State = Callable[[], dict[str, Tensor]]
CPU = torch.device("cpu")
VQP, DIFFUSERS = "vector-quantize-pytorch", "diffusers"
DECAY, COMMITMENT, STAGES = 0.99, 0.25, 4
GAP = 1e-3  # in squared distance, between the nearest code and the second, that no rounding closes

# ---- the same work for both ----


def maps(batch: int, dim: int, side: int) -> Tensor:
    """Encoder outputs (batch, dim, side, side), a function of the shape."""
    return torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(1))


def random_books(count: int, size: int, dim: int) -> list[Tensor]:
    """Codebooks (size, dim), each of about half the length of the one before, as residuals are."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, dim, generator=generator) / 2**i for i in range(count)]


def clear_maps(batch: int, side: int, books: list[Tensor]) -> Tensor:
    """Encoder outputs (batch, dim, side, side) of which, in every book, one code is nearest beyond rounding."""
    generator = torch.Generator().manual_seed(3)
    count, dim = batch * side * side, books[0].shape[1]
    clear = torch.empty(0, dim)
    while len(clear) < count:
        rows = torch.randn(count, dim, generator=generator)
        clear = torch.cat([clear, rows[is_clear(rows, books)]])
    return clear[:count].view(batch, side, side, dim).movedim(-1, 1).contiguous()


def is_clear(rows: Tensor, books: list[Tensor]) -> Tensor:
    """Which of rows (N, D) are, in every stage, nearer to one code than to all others by GAP, in float64."""
    clear, residual = torch.ones(len(rows), dtype=torch.bool), rows.double()
    for book in books:
        nearest = [torch.cdist(part, book.double()).square().topk(2, largest=False) for part in residual.split(256)]
        distances = torch.cat([found.values for found in nearest])
        clear &= distances[:, 1] - distances[:, 0] > GAP
        residual = residual - book.double()[torch.cat([found.indices[:, 0] for found in nearest])]
    return clear


def training_step(
    z: Tensor,
    forward: Forward,
    update: Callable[[], object] = lambda: None,
    state: State = dict,
    gradients: bool = True,
) -> Step:
    """Forward, backward of a fixed gradient of the codes and of the loss, update; returns all of it, and `state()` afterwards."""
    z = z.clone().requires_grad_()
    by_codes = torch.randn(z.shape, generator=torch.Generator().manual_seed(4)).to(z)

    def step() -> dict[str, Tensor]:
        z.grad = None
        codes, indices, loss = forward(z)
        losses = {} if loss is None else {"loss": loss}
        torch.autograd.backward([codes, *losses.values()], [by_codes, *map(torch.ones_like, losses.values())])
        update()
        known = {"gradients": z.grad} if gradients and z.grad is not None else {}
        return {"codes": codes, "indices": indices, **losses, **known, **state()}

    return step


def our_forward(quantizer: Quantizer) -> Forward:
    """Of any of our quantizers."""

    def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out = quantizer(z)
        if quantizer.training:
            quantizer.observe(out)
        return out.codes, out.indices, out.loss if out.losses else None

    return forward


def vq_state(book: Tensor) -> dict[str, Tensor]:
    """Of a VQ that begins with this codebook (K, D)."""
    return {"codebook": book, "total": book, "count": torch.ones(len(book)), "step": torch.tensor(0)}


def peer_vq(book: Tensor) -> Any:
    """vector-quantize-pytorch's with this codebook (K, D) and our options."""
    from vector_quantize_pytorch import VectorQuantize

    made = VectorQuantize(
        dim=book.shape[1],
        codebook_size=len(book),
        decay=DECAY,
        commitment_weight=COMMITMENT,
        rotation_trick=False,
        accept_image_fmap=True,
    )
    set_peer_book(made, book)
    return made.train()


def set_peer_book(vq: Any, book: Tensor) -> None:
    """As if the codebook (K, D) had been drawn."""
    vq._codebook.embed.data.copy_(book)
    vq._codebook.embed_avg.data.copy_(book)


# ---- the rows ----


def vq_training(batch: int, side: int, size: int, dim: int, device: torch.device, **least: float) -> Comparison:
    """The codebook of running means."""
    books = random_books(1, size, dim)
    z = clear_maps(batch, side, books).to(device)
    ours = VQ(size, dim, COMMITMENT, DECAY, restart_threshold=0)
    ours.load_state_dict(vq_state(books[0]))
    ours, theirs = ours.to(device).train(), peer_vq(books[0]).to(device)
    own = training_step(z, our_forward(ours), ours.update, lambda: {"codebook": ours.codebook})
    peer = training_step(z, theirs, state=lambda: {"codebook": theirs.codebook})
    return Comparison(f"VQ step, N = {batch * side * side}, K = {size}", VQP, own, peer, **least)


def search(batch: int, side: int, size: int, dim: int, device: torch.device, **least: float) -> Comparison:
    """The nearest code alone: what diffusers' quantizer computes, without its losses; its module is called once."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    books = random_books(1, size, dim)
    z, book = clear_maps(batch, side, books).to(device), books[0].to(device)
    rows = z.movedim(1, -1).reshape(-1, dim)
    module = VectorQuantizer(size, dim, beta=COMMITMENT, legacy=False).to(device)
    module.embedding.weight.data.copy_(book)

    def peer() -> dict[str, Tensor]:
        return {"indices": torch.argmin(torch.cdist(rows, book), dim=1)}

    with torch.no_grad():
        if not torch.equal(module(z)[2][2].flatten(), peer()["indices"]):
            raise ValueError("diffusers' VectorQuantizer no longer searches by cdist and argmin: change this row")

    def ours() -> dict[str, Tensor]:
        return {"indices": nearest_code(rows, book)}

    return Comparison(f"nearest code, N = {len(rows)}, K = {size}", DIFFUSERS, ours, peer, **least)


def kernel(batch: int, side: int, size: int, dim: int, device: torch.device) -> Comparison:
    """The Triton kernel beside torch by the chunk, which is what the search is where there is no kernel."""
    books = random_books(1, size, dim)
    rows = clear_maps(batch, side, books).to(device).movedim(1, -1).reshape(-1, dim).contiguous()
    codes = books[0].to(device)
    bias = codes.square().sum(1) / -2

    def by_chunk() -> dict[str, Tensor]:
        with full_precision():
            chunks = rows.split(rows_per_chunk(size))
            return {"indices": torch.cat([torch.addmm(bias, chunk, codes.T).argmax(1) for chunk in chunks])}

    def by_kernel() -> dict[str, Tensor]:
        return {"indices": nearest_kernel.highest_score(rows, codes, bias)}

    return Comparison(f"nearest code by the kernel, K = {size}", "torch by the chunk", by_kernel, by_chunk)


def lfq_training(batch: int, side: int, bits: int, device: torch.device, **least: float) -> Comparison:
    """Signs and their entropy. The peer counts the bits from the other end, so its channels are turned around."""
    from vector_quantize_pytorch import LFQ as PeerLFQ

    ours = LFQ(bits, commitment=COMMITMENT, entropy_weight=0.1, inverse_temperature=100.0).to(device).train()
    theirs = PeerLFQ(codebook_size=2**bits, entropy_loss_weight=0.1, commitment_loss_weight=COMMITMENT).to(device)
    z = maps(batch, bits, side).to(device)

    def peer(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, loss = theirs(x.flip(1), inv_temperature=100.0)
        return codes.flip(1), indices.long(), loss

    own = training_step(z, our_forward(ours), gradients=False)
    name = f"LFQ step, N = {batch * side * side}, 2^{bits} codes"
    return Comparison(name, VQP, own, training_step(z, peer, gradients=False), tolerance=1e-4, **least)


def fsq_training(batch: int, side: int, levels: tuple[int, ...], device: torch.device, **least: float) -> Comparison:
    """No codebook, no loss."""
    from vector_quantize_pytorch import FSQ as PeerFSQ

    ours, theirs = FSQ(levels).to(device).train(), PeerFSQ(list(levels)).to(device).train()
    z = maps(batch, len(levels), side).to(device)

    def peer(x: Tensor) -> tuple[Tensor, Tensor, None]:
        codes, indices = theirs(x)
        return codes, indices.long(), None

    name = f"FSQ step, N = {batch * side * side}, {','.join(map(str, levels))}"
    return Comparison(name, VQP, training_step(z, our_forward(ours)), training_step(z, peer), **least)


def residual_training(batch: int, side: int, size: int, dim: int, device: torch.device) -> Comparison:
    """Four stages with a codebook each. The peer gets vectors as rows: of maps it takes square ones of D = h = w alone."""
    from vector_quantize_pytorch import ResidualVQ

    books = random_books(STAGES, size, dim)
    z = clear_maps(batch, side, books).to(device)
    base = {"type": "vq", "codebook_size": size, "dim": dim, "decay": DECAY, "restart_threshold": 0}
    ours = make_quantizer({"type": "residual", "base": base, "depth": STAGES})
    ours.load_state_dict({f"stages.{i}.{k}": v for i, book in enumerate(books) for k, v in vq_state(book).items()})
    options = {"decay": DECAY, "commitment_weight": COMMITMENT, "rotation_trick": False}
    theirs = ResidualVQ(dim=dim, num_quantizers=STAGES, codebook_size=size, **options)
    for layer, book in zip(theirs.layers, books, strict=True):
        set_peer_book(layer, book)
    ours, theirs = ours.to(device).train(), theirs.to(device).train()

    def peer(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, losses = theirs(x.flatten(2).mT)
        return codes.mT.view(x.shape), indices.view(batch, side, side, STAGES), losses.sum()

    def our_books() -> dict[str, Tensor]:
        return {"codebook": torch.stack([ours.get_buffer(f"stages.{i}.codebook") for i in range(STAGES)])}

    def peer_books() -> dict[str, Tensor]:
        return {"codebook": torch.stack([layer.codebook for layer in theirs.layers])}  # pyright: ignore

    own = training_step(z, our_forward(ours), ours.update, our_books, gradients=False)
    other = training_step(z, peer, state=peer_books, gradients=False)
    return Comparison(f"residual VQ step, {STAGES} stages, K = {size}", VQP, own, other)


def simvq_training(batch: int, side: int, size: int, dim: int, device: torch.device) -> Comparison:
    """A frozen codebook and a linear map of it, with a bias on both sides; the optimizer's step is left out."""
    from vector_quantize_pytorch import SimVQ as PeerSimVQ

    ours, transform = SimVQ(size, dim, COMMITMENT), nn.Linear(dim, dim)
    theirs = PeerSimVQ(dim, size, transform, channel_first=True, rotation_trick=False)
    theirs.get_buffer("frozen_codebook").copy_(ours.base)
    transform.load_state_dict({"weight": ours.weight.data, "bias": ours.bias.data})
    z = clear_maps(batch, side, [ours.codes().detach()]).to(device)
    ours, theirs = ours.to(device).train(), theirs.to(device).train()

    def anew(module: nn.Module, forward: Any) -> Forward:
        def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            module.zero_grad()
            return forward(x)

        return call

    def by_weight(weight: Tensor) -> dict[str, Tensor]:
        return {} if weight.grad is None else {"gradients of the map": weight.grad}

    own = training_step(z, anew(ours, our_forward(ours)), state=lambda: by_weight(ours.weight))
    peer = training_step(z, anew(theirs, theirs), state=lambda: by_weight(transform.weight))
    return Comparison(f"SimVQ step, N = {batch * side * side}, K = {size}", VQP, own, peer)


def tokenizer_training(
    batch: int, image_size: int, width: int, size: int, dim: int, device: torch.device, **least: float
) -> Comparison:
    """A whole tokenizer's step with AdamW, beside the same encoder and decoder with the peer's quantizer between them."""
    from midway.tokenizers.tokenizer import ImageTokenizer  # needs diffusers, which the other rows do not

    torch.manual_seed(0)
    config = {"type": "vq", "codebook_size": size, "dim": dim, "decay": DECAY, "restart_threshold": 0}
    tokenizer = ImageTokenizer(3, image_size, width, downsample=4, quantizer=config).train()
    tokenizer.to(device)  # pyright: ignore[reportArgumentType]
    images = maps(batch, 3, image_size).clamp(-1, 1).to(device)
    tokenizer.start(images)
    encoder, decoder = copy.deepcopy(tokenizer.encoder), copy.deepcopy(tokenizer.decoder)
    theirs = peer_vq(tokenizer.quantizer.get_buffer("codebook").cpu()).to(device)

    def our_forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = tokenizer(x)
        tokenizer.observe(out.quantized)
        return out.reconstruction, out.quantized.indices, out.quantized.loss

    def peer(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, loss = theirs(encoder(x))
        return decoder(codes), indices, loss

    def our_book() -> dict[str, Tensor]:
        return {"codebook": tokenizer.quantizer.get_buffer("codebook")}

    def peer_book() -> dict[str, Tensor]:
        return {"codebook": theirs.codebook}

    own = optimizer_step(images, our_forward, list(tokenizer.parameters()), our_book, tokenizer.update)
    other = optimizer_step(images, peer, [*encoder.parameters(), *decoder.parameters()], peer_book)
    name = f"tokenizer step, {image_size}x{image_size}, batch {batch}"
    return Comparison(name, f"same with {VQP}", own, other, tolerance=1e-3, flips=1e-3, **least)


def optimizer_step(
    images: Tensor,
    forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    parameters: list[nn.Parameter],
    state: State,
    update: Callable[[], object] = lambda: None,
) -> Step:
    """Of squared error and the quantizer's loss, with AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> dict[str, Tensor]:
        reconstruction, indices, loss = forward(images)
        loss = F.mse_loss(reconstruction, images) + loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update()
        return {"indices": indices, "loss": loss, **state()}

    return step


def usage_counting(images: int, tokens: int, size: int, device: torch.device, **least: float) -> Comparison:
    """How often each code is used by `images` images: batches of 512, beside a loop over indices, of which 1 % is run."""
    indices = torch.randint(0, size, (images, tokens), generator=torch.Generator().manual_seed(5)).to(device)
    part, used = indices[: max(1, images // 100)], dict[int, int]()

    def loop() -> dict[str, Tensor]:
        used.update(dict.fromkeys(range(size), 0))
        for index in part.flatten():
            used[int(index.item())] += 1
        return {}

    def ours() -> dict[str, Tensor]:
        torch.stack([histogram(batch, size) for batch in indices.split(512)]).sum(0)
        return {}

    loop()
    if histogram(part, size).tolist() != list(used.values()):
        raise ValueError("the histogram is not what a loop counts")
    share = len(part) / images
    return Comparison(f"usage of {images} images, K = {size}", "a loop", ours, loop, share=share, **least)


@dataclass(frozen=True)
class Sizes:
    """(batch, side of the map) of N = batch side^2 vectors, and K."""

    small: tuple[int, int] = (8, 32)
    small_codes: int = 1024
    large: tuple[int, int] = (16, 16)
    large_codes: int = 16384
    dim: int = 8
    lfq: tuple[int, int] = (8, 8)
    bits: int = 16
    levels: tuple[int, ...] = (8, 5, 5, 5)
    batch: int = 64
    image_size: int = 32
    width: int = 48
    images: int = 50_000
    tokens: int = 64


def comparisons(sizes: Sizes, device: torch.device) -> list[Callable[[], Comparison]]:
    """All rows, made one at a time."""
    small, large = (*sizes.small, sizes.small_codes, sizes.dim), (*sizes.large, sizes.large_codes, sizes.dim)
    network = (sizes.batch, sizes.image_size, sizes.width, sizes.small_codes, sizes.dim)
    made: list[Callable[[], Comparison]] = [
        partial(vq_training, *small, device, time=10.0),
        partial(vq_training, *large, device, time=12.0, memory=15.0),
        partial(search, *large, device, time=2.0, memory=10.0),
        partial(lfq_training, *sizes.lfq, sizes.bits, device, time=50.0),
        partial(fsq_training, *sizes.small, sizes.levels, device, time=1.0),
        partial(tokenizer_training, *network, device, time=1.5),
        partial(residual_training, *small, device),
        partial(simvq_training, *small, device),
        partial(usage_counting, sizes.images, sizes.tokens, sizes.large_codes, device, time=100.0),
    ]
    return [*made, partial(kernel, *large, device)] if device.type == "cuda" else made


def rows_of(make: Callable[[], Comparison], seconds: float, turns: int, device: torch.device) -> Iterator[Measured]:
    """The lines of a comparison that is made only now: no two are in memory together."""
    yield from measure(make(), seconds, turns, device)


def main() -> int:
    """Print the table, write the JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantizers.json")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long the turns of a row take")
    parser.add_argument("--turns", type=int, default=10, help="of a row, at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load, devices = os.getloadavg(), [CPU]
    if arguments.device != "cpu":
        devices.append(torch.device(arguments.device))
    makers = [
        partial(rows_of, make, arguments.seconds, arguments.turns, device)
        for device in devices
        for make in comparisons(Sizes(), device)
    ]
    rows = printed(makers, 82)
    peers = {name: version_of(name) for name in (VQP, DIFFUSERS)}
    loads = {"before": load, "after": os.getloadavg()}
    return conclude(rows, arguments.out, arguments.device, peers=peers, load=loads)


if __name__ == "__main__":
    sys.exit(main())
