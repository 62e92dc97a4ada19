"""docs/scaling.md: its commands parse, its SLURM script stops, requeues and resumes, its tables are those that are counted."""

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scaling_tables
from pipelines import SCRIPTS

from midway.gen.flags.cli import resolve
from midway.gen.flags.tasks import LatentTask, TokenizerTask
from midway.gen.recipes.baseline_recipes import BASELINE_RECIPES
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES

ROOT = SCRIPTS.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
JOB = BLOCKS[0]
COMMANDS = re.findall(r"midway train (\w+) (.*?)(?:' &| &|…)?$", PAGE.replace("\\\n", " "), re.MULTILINE)


def test_the_job_has_fifteen_lines_and_asks_for_the_signal() -> None:
    lines = JOB.strip().splitlines()
    assert len(lines) <= 16 and lines[0] == "#!/bin/bash"
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@120"} <= set(lines)
    assert subprocess.run(["bash", "-n"], input=JOB, text=True, check=False).returncode == 0
    assert "--resume auto" in JOB


@pytest.mark.parametrize(("kind", "arguments"), COMMANDS)
def test_its_trainings_are_command_lines(kind: str, arguments: str) -> None:
    task, recipes = (LatentTask, LATENT_RECIPES) if kind == "latent" else (TokenizerTask, TOKENIZER_RECIPES)
    resolve(task, recipes, shlex.split(arguments))  # pyright: ignore[reportArgumentType]
    assert BASELINE_RECIPES


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def job(folder: Path, out: Path) -> subprocess.Popen[str]:
    """The SLURM script on this machine: a training of digits under a launcher of one process, and scontrol that notes."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    program(tools / "accelerate", f'#!/bin/bash\nwhile [[ $1 != -m ]]; do shift; done\nexec {sys.executable} "$@"\n')
    program(tools / "scontrol", f'#!/bin/bash\necho "$@" >> {folder}/requeued\n')
    flags = f"digits-fsq --out {out} --model.width 8 --batch-size 8 --steps 400 --save-every 20 --log-every 10"
    text = JOB.replace("source .venv/bin/activate", f"cd {ROOT}")
    text = text.replace("train latent imagenet256-dit-xl", f"train tokenizer {flags}")
    path = f"{tools}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "17", "ACCELERATE_USE_CPU": "true"}
    (folder / "job.sh").write_text(text)
    return subprocess.Popen(
        ["bash", str(folder / "job.sh")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_job_saves_on_the_signal_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = job(tmp_path, out)
    try:
        limit = time.monotonic() + 120
        while not list(out.glob("checkpoints/step-*")) and first.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)  # to the shell alone, as --signal=B:
        text, _ = first.communicate(timeout=60)
    finally:
        first.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", text
    assert "stopped by SIGTERM" in text
    stopped = max(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*"))
    assert 0 < stopped < 400
    second, _ = job(tmp_path, out).communicate(timeout=120)
    assert f"resuming from step {stopped} on cpu" in second
    assert (out / "checkpoints" / "step-400").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", "a training that ends is not queued again"


def test_the_table_of_disk_space_is_that_which_is_counted() -> None:
    assert scaling_tables.embedded(PAGE, "disk", scaling_tables.disk_table()) == PAGE


@pytest.mark.slow
def test_the_plan_is_that_which_is_counted_and_recipes_state_it() -> None:
    for name, lines in scaling_tables.tables():
        assert scaling_tables.embedded(PAGE, name, lines) == PAGE
    for line in re.findall(r"^\| `imagenet256.*$", PAGE, re.MULTILINE):
        name, parameters, kept, activations, _, flops, hours = (cell.strip("| `") for cell in line.split(" | "))
        make = TOKENIZER_RECIPES[name] if name in TOKENIZER_RECIPES else LATENT_RECIPES[name]
        stated = " ".join((make.__doc__ or "").split())
        for words in (parameters, f"{kept} GiB", f"{float(flops):.2f} TFLOP", f"{hours} hours"):
            assert words in stated, (name, words)
        assert f"{float(activations):.2f} GiB an image" in stated
