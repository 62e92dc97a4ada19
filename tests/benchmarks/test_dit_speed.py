"""benchmarks/dit_speed.py: both networks compute the same, and a row is what was timed."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_modules import as_before, benchmark, run_main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    pytest.importorskip("diffusers", reason="the peer")
    with as_before():
        return benchmark("dit_speed")


def small(speed: ModuleType) -> object:
    return speed.Size("small, 4 tokens", 16, 2, 2, 2, 3, 4, 5)


def test_both_networks_are_one_function_with_one_gradient(speed: ModuleType) -> None:
    """The peer embeds time and class in every block: its gradients there sum up to ours."""
    both = speed.networks_of(small(speed), CPU)
    ours, theirs = both.ours(both.x, both.angle), both.theirs(both.x, both.angle)
    assert speed.difference(ours, theirs) < 1e-5 < ours.std()
    for found in (ours, theirs):
        (found - both.target).square().mean().backward()
    parts = speed.peer_weights(both.model.network, both.size)
    peer = dict(both.peer.named_parameters())
    assert parts.keys() == peer.keys()
    net = both.model.network
    for own, name in ((net.label.weight, "class_embedder.embedding_table"), (net.time[0].weight, "embedder.linear_1")):
        summed = sum(p.grad for key, p in peer.items() if key.endswith(f"{name}.weight"))
        assert own.grad.norm() > 0 and speed.difference(summed, own.grad) < 1e-4
    blocks = [peer[f"transformer_blocks.{i}.attn1.to_k.weight"].grad for i in range(2)]
    for block, found in zip(net.blocks, blocks, strict=True):
        assert speed.difference(found, block.attention.qkv.weight.grad.chunk(3)[1]) < 1e-4


@pytest.mark.parametrize("kind", ["training", "sampling"])
def test_a_row_has_the_median_of_the_ratios_of_turns(
    speed: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([1.0, 3.0, 1.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(speed, "process_seconds", lambda work: (work(), next(seconds))[1])
    row = speed.measured(kind, speed.Way(), small(speed), CPU, 0.0, 3)
    assert (row.ours, row.peer, row.ratio, row.turns) == (1000.0, 3000.0, 2.0, 3)
    assert row.quartiles == (1.5, 2.5) and row.held is True and row.tokens == 4
    assert 0 < row.differences["output, relative"] < 1e-5
    blocks = 2 * (16 * 256 + 16 + 16 * 16 + 16 + 11 * 16)  # of time and class: one set here, one a block there
    assert row.peer_parameters - row.parameters == blocks // 2


def test_sides_that_differ_are_an_error(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed.networks_of

    def changed(*arguments: object) -> object:
        both = real(*arguments)
        with torch.no_grad():
            both.peer.proj_out_2.bias.add_(0.1)
        return both

    monkeypatch.setattr(speed, "networks_of", changed)
    with pytest.raises(ValueError, match="the sides differ by"):
        speed.measured("sampling", speed.Way(), small(speed), CPU, 0.0, 1)


def test_the_benchmark_prints_and_writes_its_rows(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "SIZES", (small(speed), small(speed)))
    flags = ("--only", "sampling", "--turns", 2, "--seconds", 0, "--device", "cpu")
    with torch.compiler.set_stance("force_eager"):
        report = run_main(speed, tmp_path / "dit_speed.json", *flags)
    names = [row["name"] for row in report.json["rows"]]
    assert names == [
        f"sampling, small, 4 tokens, batch 5, {way}"
        for way in ("float32", "float32", "bf16", "bf16", "float32, compiled")
    ]
    assert report.json["threads"] == 1 and len(report.json["load"]) == 3
    assert report.code == int(any(row["held"] is False for row in report.json["rows"]))
    assert json.dumps(report.json) and sum("beside diffusers" in line for line in report.lines) == 5
