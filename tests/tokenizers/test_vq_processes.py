"""The codebook does not depend on how the batches of a run are divided among processes and micro-batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from multiprocess import together
from torch import Tensor

from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.vq import VQ

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, STEPS, SIZE = 24, 7, 128
SKIPPED, BROKEN = 2, 4  # the step that the loop skips, and that in which the encoder makes NaN of one sample
LIMIT = min(1.0, BATCH * 16 / (4 * SIZE))  # N_k of a code that has just restarted


def part(step: int, first: int, count: int) -> tuple[ImageBatch, Context]:
    """`count` samples of a step's batch: noise, its contrast differing between steps, so that codes fall out of use."""
    pixels = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    images = (128 + (40 if step % 2 else 10) * pixels).clamp(0, 255).to(torch.uint8)[first : first + count]
    ids = step * BATCH + torch.arange(first, first + count)
    return ImageBatch(images, torch.zeros(count, dtype=torch.int64)), Context(5, step, ids)


@contextmanager
def broken_encoder(model: ImageTokenizer, context: Context) -> Iterator[None]:
    """The encoder's output is NaN for one sample of step `BROKEN`."""
    bad = (context.sample_ids == BROKEN * BATCH + 3).view(-1, 1, 1, 1)
    handle = model.encoder.register_forward_hook(lambda *call: torch.where(bad, torch.nan, call[-1]))
    yield
    handle.remove()


def train(accumulation: int = 1, rank: int = 0, processes: int = 1) -> tuple[dict[str, Tensor], list[int]]:
    """The quantizer's state after all steps of one process's share, and how many codes each step has just restarted."""
    torch.manual_seed(0)
    quantizer = {"type": "vq", "codebook_size": SIZE, "dim": 4, "decay": 0.5, "seed": 1}
    objective = TokenizerObjective(ImageTokenizer(width=8, blocks=1, quantizer=quantizer), flip=True).train()
    vq = objective.tokenizer.quantizer
    assert isinstance(vq, VQ)
    share, restarted = BATCH // (accumulation * processes), []
    objective.start(*part(0, 0, 8))
    for step in range(STEPS):
        for micro in range(accumulation):
            batch, context = part(step, (micro * processes + rank) * share, share)
            with broken_encoder(objective.tokenizer, context):
                objective.loss(batch, context)
        objective.after_step(torch.tensor(step != SKIPPED))
        restarted.append(int((vq.count == LIMIT).sum()))
    return vq.state_dict(), restarted


def assert_same_codebook(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-5, atol=1e-5)


def test_restarts_happen_in_these_runs() -> None:
    """Otherwise the tests below would say nothing about them."""
    state, restarted = train()
    fresh = [count for step, count in enumerate(restarted) if step not in (SKIPPED, BROKEN)]
    assert all(0 < count < SIZE // 2 for count in fresh[1:])
    assert restarted[BROKEN] == restarted[BROKEN - 1]
    assert restarted[SKIPPED] == restarted[SKIPPED - 1]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_give_the_codebook_of_the_whole_batch(accumulation: int) -> None:
    state, restarted = train()
    divided, also_restarted = train(accumulation)
    assert_same_codebook(divided, state)
    assert restarted == also_restarted


def run_rank(rank: int, processes: int, folder: str) -> None:
    dist.init_process_group("gloo")
    hopeless = VQ(16, 4, seed=rank)
    hopeless.initialise(torch.full((9, 4), torch.nan if rank == 0 else 1.0))
    states = [train(accumulation, rank, processes)[0] for accumulation in (1, 2)]
    torch.save([*states, hopeless.state_dict()], f"{folder}/{rank}.pt")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_give_the_codebook_of_one(processes: int, tmp_path: Path) -> None:
    together(run_rank, processes, processes, str(tmp_path))
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes))
    for states in others:
        for mine, of_first in zip(states, first, strict=True):
            assert all(torch.equal(mine[name], of_first[name]) for name in of_first)
    expected, _ = train()
    for state in first[:2]:
        assert_same_codebook(state, expected)
    assert torch.equal(first[2]["codebook"], VQ(16, 4, seed=0).codebook)  # nothing finite on rank 0: as it was drawn
