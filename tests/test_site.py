"""The site: its commands are what the command line takes, its code and notebook run, and extras that messages name exist."""

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from pictures import noise, save
from pipelines import Pipeline

from midway.gen.commands.main import COMMANDS, named
from midway.gen.core.errors import MidwayError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LAUNCHERS = ("accelerate launch", "torchrun", "python -m torch.distributed.run", "srun")


class Parsed(BaseException):
    """The flags were parsed; nothing runs."""


def lines_of(page: Path) -> Iterator[str]:
    """Commands of a page: lines of shell blocks, and indented ones, continued lines joined."""
    text = page.read_text()
    shell = [block for _, language, block in FENCE.findall(text) if language in ("bash", "sh", "console")]
    indented = re.findall(r"^    (.*)$", FENCE.sub("", text), re.MULTILINE)
    for line in ("\n".join([*shell, *indented])).replace("\\\n", " ").splitlines():
        if re.match(r"\s*(midway|python3?|" + "|".join(LAUNCHERS) + r")\s", line):
            yield line.strip()


def words_of(line: str) -> list[str]:
    """The words of a command, without comments; of an ellipsis after a training, and of a loop's variable, one example."""
    line = re.split(r"\s{2,}(on a|\(|;)|  #| ;| & *$| &$", line)[0].replace("$model", "glow")
    words = shlex.split(re.sub(r"train latent …", "train latent digits-dit", line), comments=True)
    return [word for word in words if word not in ("...", "…", "&")]


def arguments_of(words: list[str]) -> list[str] | None:
    """What follows `midway`, also behind a launcher; None for a command of something else."""
    places = [i for i, word in enumerate(words) if word in ("midway", ".venv/bin/midway")]
    return words[places[0] + 1 :] if places else None


COMMAND_LINES = sorted({(page.name, line) for page in PAGES for line in lines_of(page)})
OURS = [(page, line) for page, line in COMMAND_LINES if arguments_of(words_of(line)) is not None]
OTHERS = [(page, line) for page, line in COMMAND_LINES if arguments_of(words_of(line)) is None]


def parse(arguments: list[str]) -> None:
    """Parse as `midway` does; MidwayError for what it does not take, Parsed otherwise."""
    found = named(arguments)
    assert found is not None, f"there is no command {arguments[:2]}"
    command = COMMANDS[found[0]]
    getattr(import_module(f"midway.gen.{command.module}"), command.function)(found[1])


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end once their flags are parsed, in an empty folder."""
    real = tyro.cli

    def cli(*arguments: Any, **options: Any) -> Any:
        raise Parsed(real(*arguments, **options))

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.chdir(tmp_path)


def test_every_command_of_the_pages_is_one_that_the_command_line_takes(parse_only: None) -> None:
    """Recipe, flags and values, as the real parser takes them; nothing runs."""
    assert len(OURS) > 60
    wrong = []
    for page, line in OURS:
        arguments = arguments_of(words_of(line)) or []
        if {"--help", "--version"} & {*arguments} or not arguments:
            continue
        try:
            parse(arguments)
        except Parsed:
            continue
        except MidwayError as error:
            wrong.append(f"{page}: {line}\n  {error}")
        except AssertionError as error:
            wrong.append(f"{page}: {line}\n  {error}")
        else:
            wrong.append(f"{page}: {line}\n  parsed nothing")
    assert not wrong, "\n".join(wrong)


def test_commands_within_sentences_exist_and_have_their_flags(parse_only: None) -> None:
    """They may be without what they require."""
    spans = {
        (page.name, span)
        for page in PAGES
        for span in re.findall(r"`(midway [a-z][^`]*)`", FENCE.sub("", page.read_text()))
    }
    assert len(spans) > 20
    for page, span in sorted(spans):
        try:
            parse([word for word in words_of(span)[1:] if word != "--help"])
        except Parsed:
            continue
        except MidwayError as error:
            assert not re.match("unknown|Unrecogni", str(error)), f"{page}: {span}\n{error}"


@pytest.mark.parametrize("line", ["train tokenizer digits-fsq --stepz 3", "train latent no-such", "sampel --n 3"])
def test_the_test_of_commands_sees_a_wrong_one(line: str, parse_only: None) -> None:
    with pytest.raises((MidwayError, AssertionError)):
        parse(line.split())


def test_every_other_command_names_a_file_and_flags_that_it_has() -> None:
    for page, line in OTHERS:
        words = words_of(line)
        if words[1:2] == ["-c"]:
            compile(words[2], page, "exec")
            continue
        files = [word for word in words if word.endswith(".py")]
        if not files:
            continue
        source = (ROOT / files[0]).read_text()
        for flag in [word.split("=")[0] for word in words[words.index(files[0]) + 1 :] if word.startswith("--")]:
            field = flag.removeprefix("--").replace("-", "_")
            assert flag in source or re.search(rf"\b{field}\b", source), f"{page}: {line}: no {flag}"


# ---- Start, its notebook, and Your own images ----


def python_of(page: str) -> list[str]:
    return [block for _, language, block in FENCE.findall((ROOT / "docs" / page).read_text()) if language == "python"]


def shell_of(page: str) -> list[str]:
    found = FENCE.findall((ROOT / "docs" / page).read_text())
    blocks = [str(block).replace("\\\n", " ") for _, language, block in found if language == "bash"]
    return [line for block in blocks for line in block.splitlines()]


def cells() -> list[str]:
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_the_code_of_start_and_runs(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [cell.strip() for cell in cells()] == [block.strip() for block in python_of("start.md")]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-dit").symlink_to(pipeline.model)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for cell in cells():
        exec(cell, scope)
    assert scope["images"].shape == (16, 1, 8, 8)
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    for name in ("tokenizer", "model", "model/tokenizer", "solver"):
        card = (tmp_path / "shared" / name / "README.md").read_text()
        assert "## Licence\n" in card and str(pipeline.root) not in card and str(tmp_path) not in card


@pytest.mark.slow
@pytest.mark.parametrize("page", ["start.md", "own-images.md"])
def test_the_commands_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, but for the number of steps of trainings."""
    import subprocess

    for label in ("cat", "dog"):
        for index in range(60):
            save(tmp_path / "pictures" / label / f"{index}.png", noise(32, 32, seed=index + 100 * (label == "dog")))
    for line in shell_of(page):
        words = words_of(line)
        if not words:
            continue
        assert words[0] == "midway"
        steps = ["--steps", "20"] if words[1] == "train" and "--dry-run" not in words else []
        command = [sys.executable, "-m", *words, *steps]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


# ---- the site itself ----


def test_every_page_is_in_the_navigation() -> None:
    pages = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == {
        name for name in pages if re.fullmatch(r"[a-z0-9.-]+", name)
    }


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the theme is not installed: pip install 'midway[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    build(config)
    text = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    outside = set(re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:[^"]+)"', text))
    assert not outside and "unpkg.com" not in text, "pages fetch from elsewhere"
    for name in ("make_solver", "LatentModel"):
        assert f'id="{name.lower()}"' in (tmp_path / "api" / "index.html").read_text().lower()


# ---- extras and the lock ----


def test_messages_name_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [
        path for folder in ("gen", "samplers", "tokenizers", "scripts") for path in (ROOT / folder).rglob("*.py")
    ]
    texts = {path: path.read_text() for path in [*sources, *PAGES]}
    found = {(name, path.name) for path, text in texts.items() for name in re.findall(r"midway\[([a-z]+)\]", text)}
    assert {name for name, _ in found} >= {"perceptual", "data"}
    assert not {pair for pair in found if pair[0] not in extras}
    weights = "".join(path.read_text() for path in (ROOT / "gen" / "features").glob("*.py"))
    found_in_code = set(re.findall(r"extra=\"(\w+)\"", weights))
    assert found_in_code and found_in_code <= {*extras}
    assert {"trackers", "hub", "data", "features", "perceptual", "docs"} <= {*extras}


def test_the_lock_is_of_one_index_and_of_these_requirements() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (locked,) = (package for package in packages if package["name"] == "midway")
    others = [package for package in packages if package is not locked]
    assert len({package["source"]["registry"] for package in others}) == 1  # KeyError of a file or a folder
    wheels = [wheel for package in others for wheel in package.get("wheels", [])]
    assert all(wheel["hash"].startswith("sha256:") for wheel in wheels)
    assert len({wheel["url"].split("/")[2] for wheel in wheels}) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    names = {re.split(r"[^\w-]", line)[0] for line in asked}
    assert {entry["name"] for entry in locked["metadata"]["requires-dist"]} == names, "run uv lock"


def test_the_workflow_and_the_citation_are_what_their_readers_take() -> None:
    """Every make target that the workflow and the Dockerfile name exists; the image copies every package."""
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert flow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    runs = [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = {target for run in runs for target in re.findall(r"\bmake ([a-z-]+)", run)}
    assert {"check", "test", "dev"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project["project"]["version"], project["project"]["license"])
    assert cited["authors"] == [{"name": "The Midway authors"}]
    copied = set(re.findall(r"^COPY (\w+) \w+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    kept = set(re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert copied == {"gen", "samplers", "tokenizers"} and copied <= kept
