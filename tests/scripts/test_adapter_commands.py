"""midway finetune, and the commands that take an adapter beside its model."""

from pathlib import Path

import pytest
from other_digits import other_digits
from pipelines import Pipeline, Script

from midway.gen.core.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_digits(tmp_path_factory.mktemp("photos"))


def test_an_adapter_is_trained_sampled_measured_merged_and_verified(
    pipeline: Pipeline, photos: Path, succeed: Script, script: Script, tmp_path: Path
) -> None:
    """Flags reach the adapter; a picture of the merged model is that of the adapter; what does not go together is an error."""
    adapter, both = tmp_path / "adapter", f"--model {pipeline.model} --adapter {tmp_path / 'adapter'}"
    flags = f"--model {pipeline.model} --data {photos} --out {adapter} --steps 4 --batch-size 16 --adapter.rank 3"
    done = succeed(f"finetune lora-ga {flags} --adapter.b-rate 2 --adapter.targets attention.qkv mlp.2")
    assert "parameters train; the model was trained on 1,600 images" in done.out
    run = Run.open(adapter, "adapter")
    assert run.config["adapter"] == {
        "rank": 3,
        "alpha": 8.0,
        "start": "gradient",
        "b_rate": 2.0,
        "targets": ["attention.qkv", "mlp.2"],
    }
    done = succeed(f"sample {both} --n 6 --nfe 4 --out {tmp_path / 'a.png'}")
    assert "0: 3, 1: 5, 2: negative" in done.out and "added to" in done.out
    succeed(f"merge_adapter {adapter} --model {pipeline.model} --out {tmp_path / 'merged'}")
    succeed(f"sample --model {tmp_path / 'merged'} --n 6 --nfe 4 --out {tmp_path / 'b.png'}")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    measured = "--features pixels --solvers euler --nfe 2 --n 24 --blocks 1 --grids uniform --exact-nfe 8 --metrics="
    succeed(f"evaluate {both} {measured}")
    assert (adapter / "report" / "report.md").exists() and not (pipeline.model / "report").exists()
    assert "resume is exact" in succeed(f"verify_resume {adapter} --steps 2").out
    for words, command in {
        "it is of a latent model": f"evaluate --adapter {adapter} --data {photos} --images {photos} --out {tmp_path / 'r'}",
        "averages of other widths are made of whole models": f"finetune lora {flags} --overwrite --posthoc 0.1",
        "at most 32": f"finetune lora {flags} --overwrite --adapter.rank 64",
    }.items():
        done = script(*command.split())
        assert done.code == 2 and words in done.err and len(done.err.splitlines()) == 3


def test_a_dry_run_reads_the_model_alone(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    flags = (
        f"--model {pipeline.model} --data nowhere --out {tmp_path / 'run'} --dry-run --dry-run-classes 4 --batch-size 8"
    )
    assert "two steps on random images" in succeed(f"finetune lora {flags}").out
    assert not (tmp_path / "run").exists()
