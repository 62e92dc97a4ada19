"""benchmarks/metrics.py: that all sides find the same distance, what is judged, printed and written. No test looks at a time."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import benchmark, run_main

for peer in ("torchmetrics", "torch_fidelity"):
    pytest.importorskip(peer, reason="the peers that distances are measured beside")

PEERS = ("scipy.linalg.sqrtm", "torchmetrics", "torch-fidelity")
TIME, ERROR = "Fréchet distance, D = 24, N = 200", "its error, N = 10 and 15 < D"


@pytest.fixture(scope="module")
def metrics() -> ModuleType:
    return benchmark("metrics")


@pytest.fixture
def small(metrics: ModuleType) -> Any:
    return metrics.Sizes(dim=24, count=200, few=(10, 15), images=40)


def clock(metrics: ModuleType, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Each side takes a given time, the second turn a tenth more."""
    turns: list[str] = []

    def process_seconds(work: Any) -> float:
        work()
        (side,) = work.args
        turns.append(side)
        return seconds[side] * (1 + 0.1 * (turns.count(side) - 1))

    monkeypatch.setattr(metrics, "process_seconds", process_seconds)


def seconds(ours: float) -> dict[str, float]:
    return {"ours": ours, "scipy.linalg.sqrtm": 6.0, "torchmetrics": 0.5, "torch-fidelity": 0.25}


@pytest.mark.parametrize(("ours", "code"), [(2.0, 0), (2.01, 1)])
def test_rows_are_judged_printed_and_written(
    ours: float, code: int, metrics: ModuleType, small: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    clock(metrics, monkeypatch, seconds(ours))
    monkeypatch.setattr(metrics, "Sizes", lambda: small)
    done = run_main(metrics, tmp_path / "out.json", "--turns", 2)
    assert done.code == code
    report = done.json
    rows = {(row["name"], row["peer_name"]): row for row in report["rows"]}
    (sweep,) = (key for key in rows if key[0].startswith("sweep of 40 images"))
    assert set(rows) - {sweep} == {(name, peer) for name in (TIME, ERROR) for peer in PEERS}
    assert rows[sweep]["target"] == "" and rows[sweep]["ours"] > 0
    for peer in PEERS:
        row, judged = rows[TIME, peer], peer == PEERS[0]
        assert (row["ours"], row["peer"], row["unit"]) == (ours, seconds(ours)[peer], "CPU s")
        assert row["ratio"] == pytest.approx(seconds(ours)[peer] / ours, abs=0.01)
        assert row["target"] == ("peer / ours >= 3" if judged else "")
        assert row["held"] is ((ours == 2.0) if judged else None)
        assert row["turns"] == 2
        assert row["differences"]["distance"] < 1e-9
        error = rows[ERROR, peer]
        assert (error["ours"], error["target"], error["held"]) == (1, "peer / ours >= 10", True)
        assert error["peer"] > 1e3
    assert set(report["peers"]) == {"scipy", *PEERS[1:]}
    printed = "\n".join(done.lines)
    assert all(printed.count(f"{name} beside {peer}") == 1 for name, peer in rows)


def test_sides_that_do_not_agree_raise(metrics: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(metrics, monkeypatch, seconds(1.0))
    true = metrics.by_sqrtm
    monkeypatch.setattr(metrics, "by_sqrtm", lambda *sides: true(*sides) * (1 + 2e-6))
    with pytest.raises(ValueError, match=r"scipy\.linalg\.sqrtm finds"):
        list(metrics.time_rows(small, 1))


def test_errors_are_relative_and_not_below_the_unit(metrics: ModuleType) -> None:
    assert metrics.relative_error(2 * (1 + 5e-9), 2.0) == pytest.approx(5000, rel=1e-6)
    assert metrics.relative_error(2 * (1 - 5e-9), 2.0) == pytest.approx(5000, rel=1e-6)
    assert metrics.relative_error(2.0, 2.0) == 1


def test_features_fall_as_one_over_k_in_no_special_direction(metrics: ModuleType) -> None:
    x = metrics.features(1, 20_000, 16)
    covariance = torch.cov(x.T)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(eigenvalues, 1 / torch.arange(1, 17).double(), rtol=0.05, atol=0)
    assert (covariance - covariance.diagonal().diag()).abs().max() > 0.05
    assert not torch.equal(metrics.features(2, 5, 16), x[:5])
