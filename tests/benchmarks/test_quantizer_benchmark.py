"""benchmarks/quantizers.py: that both sides of a row do the same work, what counts as memory, and what is judged and written.

How fast anything is depends on the machine and is no test's business: where speed matters here, the clock is one of our own.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import as_before, benchmark, run_main
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

pytest.importorskip("vector_quantize_pytorch", reason="the peer that quantizers are measured beside")

CPU = torch.device("cpu")
MIB = 2**20
TARGETS = {
    "VQ step, N = 32, K = 16": 10,
    "VQ step, N = 18, K = 32": 12,
    "VQ step, N = 18, K = 32, memory": 15,
    "nearest code, N = 18, K = 32": 2,
    "nearest code, N = 18, K = 32, memory": 10,
    "LFQ step, N = 12, 2^4 codes": 50,
    "FSQ step, N = 32, 5,4": 1,
    "tokenizer step, 8x8, batch 4": 1.5,
    "usage of 300 images, K = 32": 100,
}
INFORMATION = ("residual VQ step, 4 stages, K = 16", "SimVQ step, N = 32, K = 16")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with as_before():
        yield


@pytest.fixture(scope="module")
def quantizers() -> ModuleType:
    return benchmark("quantizers")


@pytest.fixture(scope="module")
def common(quantizers: ModuleType) -> ModuleType:
    return sys.modules[quantizers.Comparison.__module__]


@pytest.fixture(scope="module")
def sizes(quantizers: ModuleType) -> Any:
    """The smallest."""
    small = {"small": (2, 4), "small_codes": 16, "large": (2, 3), "large_codes": 32, "dim": 3, "lfq": (3, 2), "bits": 4}
    return quantizers.Sizes(**small, levels=(5, 4), batch=4, image_size=8, width=8, images=300, tokens=2)


# ---- the rows ----


def test_every_row_runs_is_checked_and_judged_by_its_target(
    quantizers: ModuleType,
    common: ModuleType,
    sizes: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(quantizers, "Sizes", lambda: sizes)
    flags = ("--device", "cpu", "--turns", 2, "--seconds", 0)
    done = run_main(quantizers, tmp_path / "made" / "q.json", *flags)
    found, out = done.json, "\n".join(done.lines)
    assert {"device", "hardware", "environment", "peers", "load"} <= set(found)
    assert set(found["peers"]) == {"vector-quantize-pytorch", "diffusers"} and "absent" not in found["peers"].values()
    rows = {row["name"]: row for row in found["rows"]}
    with_memory = [name for name in (*TARGETS, *INFORMATION) if "memory" not in name and "usage" not in name]
    assert set(rows) == {*TARGETS, *INFORMATION, *(f"{name}, memory" for name in with_memory)}
    assert len(rows) == len(found["rows"])
    for name, row in rows.items():
        least = TARGETS.get(name)
        assert row["target"] == ("" if least is None else f"peer / ours >= {least:g}")
        if least is None:
            assert row["held"] is None
        elif abs(row["ratio"] - least) > 0.01:
            assert row["held"] == (row["ratio"] > least)
        assert set(row) == {field.name for field in fields(common.Measured)}
        assert (row["unit"], row["turns"]) == (("MiB", 1) if name.endswith("memory") else ("ms", 2))
        assert row["ours"] > 0
        assert common.line(common.Measured(**row), 82) in out
    compared = {name: set(row["differences"]) for name, row in rows.items() if not name.endswith("memory")}
    step = {"codes", "indices", "loss", "gradients"}
    assert list(compared.values()) == [
        step | {"codebook"},
        step | {"codebook"},
        {"indices"},
        step - {"gradients"},
        step - {"loss"},
        {"indices", "loss", "codebook"},
        {"codes", "indices", "loss", "codebook"},
        step | {"gradients of the map"},
        set(),
    ]
    assert done.code == int(any(row["held"] is False for row in rows.values()))


def test_a_vq_step_learns_the_running_means_of_the_vectors(quantizers: ModuleType) -> None:
    """Of both sides, against the update in float64: the work is done, and it is this work."""
    comparison = quantizers.vq_training(2, 8, 16, 3, CPU)
    book = quantizers.random_books(1, 16, 3)[0].double()
    rows = quantizers.clear_maps(2, 8, [book.float()]).movedim(1, -1).reshape(-1, 3).double()
    nearest = (rows[:, None] - book).square().sum(2).argmin(1)
    hits = torch.nn.functional.one_hot(nearest, 16).double()
    count, total = 0.99 + 0.01 * hits.sum(0), 0.99 * book + 0.01 * hits.T @ rows
    smoothed = (count + 1e-5) / (count.sum() + 16e-5) * count.sum()
    loss = 0.25 * (rows - book[nearest]).square().mean()
    by_codes = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    by_loss = (rows - book[nearest]).mul(0.5 / rows.numel()).view(2, 8, 8, 3).movedim(-1, 1).float()
    for done in (comparison.ours(), comparison.peer()):
        torch.testing.assert_close(done["codebook"].double(), total / smoothed[:, None], rtol=1e-5, atol=1e-6)
        assert torch.equal(done["indices"].flatten(), nearest)
        assert done["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(done["gradients"], by_codes + by_loss)


@pytest.mark.parametrize("side", ["ours", "peer"])
def test_a_training_step_forgets_the_gradients_of_the_last(side: str, quantizers: ModuleType, sizes: Any) -> None:
    for comparison in (
        quantizers.fsq_training(2, 4, (5, 4), CPU),
        quantizers.simvq_training(2, 4, 16, 3, CPU),
    ):
        first, second = ({k: v.clone() for k, v in getattr(comparison, side)().items()} for _ in range(2))
        torch.testing.assert_close(first, second)
        assert all(bool(value.any()) for name, value in first.items() if name.startswith("gradients"))


def test_vectors_between_two_codes_are_not_clear(quantizers: ModuleType) -> None:
    """In any stage: the second book sees what the first leaves."""
    first, second = torch.tensor([[0.0, 0], [4, 0], [0, 4]]), torch.tensor([[1.0, 0], [-1, 0]])
    rows = torch.tensor([[2.0, 0], [2 + 1e-5, 0], [2.9, 0], [0, 0.1], [4.3, 0], [4.0, 1]])
    assert quantizers.is_clear(rows, [first]).tolist() == [False, False, True, True, True, True]
    assert quantizers.is_clear(rows, [first, second]).tolist() == [False, False, True, False, True, False]
    books = quantizers.random_books(3, 64, 2)
    maps = quantizers.clear_maps(5, 12, books)
    assert maps.shape == (5, 2, 12, 12)
    assert quantizers.is_clear(maps.movedim(1, -1).reshape(-1, 2), books).all()
    assert not quantizers.is_clear(torch.randn(720, 2, generator=torch.Generator().manual_seed(3)), books).all()


def test_both_tokenizers_train_alike(quantizers: ModuleType) -> None:
    """Equal losses over some steps, one optimizer step each, of as many numbers, and both quantizers learn."""
    comparison = quantizers.tokenizer_training(4, 8, 8, 16, 3, CPU)
    taken: Counter[torch.optim.Optimizer] = Counter()
    hook = register_optimizer_step_post_hook(lambda optimizer, arguments, named: taken.update([optimizer]))
    done = [
        [{k: v.clone() for k, v in side().items()} for _ in range(4)] for side in (comparison.ours, comparison.peer)
    ]
    hook.remove()
    losses = [[step["loss"].item() for step in steps] for steps in done]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len({round(loss, 6) for loss in losses[0]}) == 4
    assert list(taken.values()) == [4, 4]
    ours, peer = (sum(p.numel() for group in each.param_groups for p in group["params"]) for each in taken)
    assert ours == peer > 0
    torch.testing.assert_close(done[0][-1]["codebook"], done[1][-1]["codebook"], rtol=0, atol=1e-5)
    assert (done[0][-1]["codebook"] - done[0][0]["codebook"]).abs().max() > 1e-4


def test_the_search_is_that_of_diffusers_module(quantizers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    forward = VectorQuantizer.forward

    def farthest(self: Any, z: Tensor) -> Any:
        return None, None, (None, None, forward(self, -z)[2][2])

    monkeypatch.setattr(VectorQuantizer, "forward", farthest)
    with pytest.raises(ValueError, match="change this row"):
        quantizers.search(2, 3, 32, 3, CPU)


def test_usage_is_counted_by_a_loop_over_one_image_in_a_hundred(
    quantizers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    histogram = quantizers.histogram

    def spied(indices: Tensor, size: int) -> Tensor:
        counted.append(indices.numel())
        return histogram(indices, size)

    monkeypatch.setattr(quantizers, "histogram", spied)
    comparison = quantizers.usage_counting(1000, 3, 8, CPU)
    assert (comparison.share, counted) == (0.01, [30])
    comparison.ours()
    assert sum(counted[1:]) == 3000
    monkeypatch.setattr(quantizers, "histogram", lambda indices, size: histogram(indices, size) + 1)
    with pytest.raises(ValueError, match="histogram"):
        quantizers.usage_counting(1000, 3, 8, CPU)


def test_rows_of_a_gpu_are_shown_and_not_judged(
    quantizers: ModuleType, common: ModuleType, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kernel, a clock and a memory of our own; the kernel's row is one that only a GPU has."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        quantizers.nearest_kernel, "highest_score", lambda x, e, bias: torch.addmm(bias, x, e.T).argmax(1)
    )
    monkeypatch.setattr(common, "device_seconds", common.process_seconds)
    monkeypatch.setattr(common, "peak_bytes", lambda work, device: MIB)
    kernel = quantizers.kernel(*sizes.large, sizes.large_codes, sizes.dim, CPU)
    vq = quantizers.vq_training(*sizes.large, sizes.large_codes, sizes.dim, CPU, time=12.0, memory=15.0)
    rows = [row for comparison in (kernel, vq) for row in common.measure(comparison, 0, 2, cuda)]
    assert [row.name for row in rows] == [
        "nearest code by the kernel, K = 32, GPU",
        "nearest code by the kernel, K = 32, GPU, memory",
        "VQ step, N = 18, K = 32, GPU",
        "VQ step, N = 18, K = 32, GPU, memory",
    ]
    assert all((row.target, row.held) == ("", None) for row in rows)
    assert len(quantizers.comparisons(sizes, cuda)) == len(quantizers.comparisons(sizes, CPU)) + 1


# ---- checking and measuring ----


def _returning(done: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: done


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("indices", lambda v: torch.cat([v[:-1], v[-1:] + 1]), "indices differ .* by 0.25"),
        ("codes", lambda v: v + 2e-5, "codes differ"),
        ("codes", lambda v: v * torch.nan, "codes differ"),
        ("codes", lambda v: v[:2], "different things"),
    ],
)
def test_sides_that_do_not_agree_raise(
    name: str, change: Callable[[Tensor], Tensor], match: str, common: ModuleType
) -> None:
    done = {"indices": torch.arange(4), "codes": torch.tensor([0.0, 1.0, -1.0, 100.0])}
    fair = common.Comparison("a", "b", _returning(done), _returning({**done, "codes": done["codes"] * (1 + 5e-6)}))
    assert common.checked(fair)["codes"] == pytest.approx(5e-6, rel=0.1)
    with pytest.raises(ValueError, match=match):
        common.checked(replace(fair, ours=_returning({**done, name: change(done[name])})))
    with pytest.raises(ValueError, match="different things"):
        common.checked(replace(fair, peer=_returning({"codes": done["codes"]})))


def test_time_is_the_lower_decile_of_turns_and_scaled_to_all_the_work(common: ModuleType) -> None:
    """On a clock of our own, ours and peer in turns; the first turn is not counted."""
    done: list[str] = []

    def seconds(work: Callable[[], dict[str, Tensor]]) -> float:
        work()
        turn = (len(done) - 1) // 2
        return (1 if done[-1] == "ours" else 4) * (1e-6 if turn == 0 else 1.0 if turn % 2 else 2.0)

    def side(name: str) -> Callable[[], dict[str, Tensor]]:
        return lambda: done.append(name) or {}

    for share, least, held in ((1.0, 4.0, True), (1.0, 4.1, False), (0.5, 8.0, True), (1.0, None, None)):
        done.clear()
        comparison = common.Comparison("a", "b", side("ours"), side("peer"), time=least, share=share)
        pairs = common.take_turns(comparison, 0, 12, seconds)
        assert done == ["ours", "peer"] * 13
        assert len(pairs) == 12
        row = common.time_row(comparison, {"codes": 0.5}, pairs)
        assert (row.ours, row.peer, row.ratio) == (1000.0, 4000.0 / share, 4.0 / share)
        assert (row.held, row.turns, row.differences) == (held, 12, {"codes": 0.5})
        row = common.time_row(comparison, {}, [(ours, peer * (1 + i)) for i, (ours, peer) in enumerate(pairs)])
        assert row.quartiles == (15 / share, 37 / share)


def test_turns_go_on_until_the_time_is_over(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])

    def second(work: object) -> float:
        now[0] += 1
        return 1.0

    comparison = common.Comparison("a", "b", dict, dict)
    for seconds, least, turns in ((0, 3, 3), (40, 3, 19), (40, 30, 30), (1e9, 3, 200)):
        assert len(common.take_turns(comparison, seconds, least, second)) == turns


def test_memory_is_the_most_that_a_step_holds_at_a_time(common: ModuleType) -> None:
    """Also inside of an operation; neither its inputs nor what is released of before."""
    before = [torch.empty(4 * MIB, dtype=torch.uint8)]
    rows, codes = torch.zeros(256, 4), torch.zeros(1024, 4)

    def mib(count: int) -> Tensor:
        return torch.empty(count * MIB, dtype=torch.uint8)

    def stairs() -> None:
        first, second = mib(2), mib(3)
        del first
        third = mib(1)
        before.clear()
        del second, third
        assert mib(4) is not None

    assert common.peak_bytes(stairs, CPU) == 5 * MIB
    kept: list[Tensor] = []
    assert common.peak_bytes(lambda: kept.append(mib(2)), CPU) == 2 * MIB
    kept.clear()
    assert common.peak_bytes(lambda: (rows.add_(1), codes.view(-1)), CPU) < 100
    searched = common.peak_bytes(lambda: torch.cdist(rows, codes).argmin(1), CPU)
    assert MIB < searched < 1.1 * MIB
    assert common.peak_bytes(dict, CPU) == 0


def test_memory_that_an_earlier_measurement_left_is_not_taken_off(common: ModuleType) -> None:
    """The profiler remembers what it has seen allocated, and would count its release as room for the next."""
    left = [torch.empty(8 * MIB, dtype=torch.uint8)]

    def release_then_allocate() -> None:
        left.clear()
        assert torch.empty(3 * MIB, dtype=torch.uint8) is not None

    assert common.peak_bytes(lambda: left.append(torch.empty(8 * MIB, dtype=torch.uint8)), CPU) == 8 * MIB
    assert common.peak_bytes(release_then_allocate, CPU) == 3 * MIB
