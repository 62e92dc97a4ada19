"""Configurations survive the round trip and raise for what does not fit; run directories."""

import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from nobody import NOBODY

from midway.gen.core import checkpoints, runs
from midway.gen.core.config import PER_CALL, from_dict, read_yaml, to_dict, write_yaml
from midway.gen.core.environment import command_line
from midway.gen.core.errors import DataError, DiskError, UsageError, nearest, one_line, raising
from midway.gen.core.files import state_hash
from midway.gen.core.locks import lock
from midway.gen.core.runs import Run


@dataclass(frozen=True)
class Inner:
    """A configuration inside another."""

    width: int = 8
    rate: float = 1e-5
    levels: tuple[int, ...] = (8, 5, 5, 5)
    mode: Literal["pre", "post"] = "pre"


@dataclass(frozen=True)
class Outer:
    """Every kind of field that a configuration has."""

    out: Path = Path("runs/a b")
    inner: Inner = field(default_factory=Inner)
    limit: float | None = None
    source: Path | None = None
    scales: tuple[float, ...] = (1.0, 2.5)
    overwrite: bool = False
    name: str = "ü: #1"


FULL = Outer(Path("/x/y"), Inner(3, 2.0, (2,), "post"), 1.5, Path("z"), (), True, "no")


# ---- configurations ----


@pytest.mark.parametrize("config", [Outer(), FULL], ids=["defaults", "all other"])
def test_a_configuration_survives_dictionary_json_and_yaml(config: Outer, tmp_path: Path) -> None:
    plain = to_dict(config)
    assert from_dict(Outer, plain) == config
    assert from_dict(Outer, json.loads(json.dumps(plain))) == config
    write_yaml(tmp_path / "c.yaml", plain)
    again = from_dict(Outer, read_yaml(tmp_path / "c.yaml"))
    assert again == config
    assert isinstance(again.out, Path)
    assert isinstance(again.inner.levels, tuple)
    assert list(read_yaml(tmp_path / "c.yaml")) == ["out", "inner", "limit", "source", "scales", "overwrite", "name"]


def test_missing_keys_keep_their_defaults() -> None:
    assert from_dict(Outer, {}) == Outer()
    assert from_dict(Outer, {"inner": {"width": 5}}) == Outer(inner=Inner(width=5))


def test_an_integer_becomes_a_float_in_a_field_of_floats() -> None:
    config = from_dict(Outer, {"limit": 3, "scales": [1, 2], "inner": {"rate": 1}})
    assert [config.limit, *config.scales, config.inner.rate] == [3.0, 1.0, 2.0, 1.0]
    assert all(type(value) is float for value in (config.limit, *config.scales, config.inner.rate))


@pytest.mark.parametrize(
    ("values", "key", "where", "close"),
    [
        ({"overwite": True}, "overwite", "config", "overwrite"),
        ({"inner": {"with": 3}}, "with", "config.inner", "width"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest(
    values: dict[str, Any], key: str, where: str, close: str
) -> None:
    with pytest.raises(UsageError) as caught:
        from_dict(Outer, values)
    assert f"'{key}' in {where}" in str(caught.value)
    assert f"did you mean '{close}'" in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"inner": {"width": 1.5}}, "config.inner.width"),
        ({"inner": {"width": True}}, "config.inner.width"),
        ({"inner": {"width": "8"}}, "config.inner.width"),
        ({"inner": {"rate": "fast"}}, "config.inner.rate"),
        ({"inner": {"rate": False}}, "config.inner.rate"),
        ({"inner": {"levels": 8}}, "config.inner.levels"),
        ({"inner": {"levels": [8, "5"]}}, "config.inner.levels"),
        ({"inner": {"levels": "85"}}, "config.inner.levels"),
        ({"inner": {"mode": "between"}}, "config.inner.mode"),
        ({"inner": None}, "config.inner"),
        ({"inner": [1]}, "config.inner"),
        ({"out": 3}, "config.out"),
        ({"out": None}, "config.out"),
        ({"limit": "1"}, "config.limit"),
        ({"overwrite": 1}, "config.overwrite"),
        ({"name": 1}, "config.name"),
    ],
)
def test_a_value_of_the_wrong_type_raises_with_its_place(values: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_dict(Outer, values)
    assert caught.value.what.startswith(where)


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_what_is_no_mapping_raises(values: Any) -> None:
    with pytest.raises(UsageError, match="not a mapping"):
        from_dict(Outer, values)


def test_a_missing_or_broken_yaml_file_raises(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: }")
    with pytest.raises(UsageError, match="not YAML"):
        read_yaml(tmp_path / "broken.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UsageError, match="not YAML"):
        read_yaml(tmp_path / "picture.yaml")


def test_a_yaml_file_cannot_build_objects(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UsageError, match="not YAML"):
        read_yaml(tmp_path / "c.yaml")


def test_nearest_lists_every_choice_and_guesses_only_what_is_close() -> None:
    assert nearest("dim", ["euler", "ddim"]) == "did you mean 'ddim'? choose one of: ddim, euler"
    assert nearest("xyz", ["euler", "ddim"]) == "choose one of: ddim, euler"


def test_only_the_named_errors_become_errors_for_users() -> None:
    with pytest.raises(DataError) as caught, raising(DataError, "a file is damaged", "train again", OSError, KeyError):
        raise KeyError("width")
    assert str(caught.value) == "a file is damaged\n  why: 'width'\n  fix: train again"
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(UsageError, match="why: ValueError: width 3"), raising(UsageError, "a", "b", why=one_line):
        raise ValueError("width\n3")
    with pytest.raises(ZeroDivisionError), raising(DataError, "a", "b", OSError):
        print(1 / 0)


@dataclass(frozen=True)
class Job:
    """A configuration with a flag of one call, inside and outside."""

    @dataclass(frozen=True)
    class Part:
        """Another inside it."""

        limit: int | None = field(default=None, metadata=PER_CALL)
        width: int = 8

    part: Part = field(default_factory=Part)
    overwrite: bool = field(default=False, metadata=PER_CALL)


def test_a_key_that_files_of_earlier_versions_lack_has_the_value_of_that_time() -> None:
    @dataclass(frozen=True)
    class Newer:
        width: int = 8
        start: str = field(default="better", metadata={"absent": "old"})

    assert (Newer().start, from_dict(Newer, {"width": 4}).start) == ("better", "old")
    assert from_dict(Newer, to_dict(Newer())) == Newer()


def test_a_flag_of_one_call_is_neither_recorded_nor_read_back() -> None:
    assert to_dict(Job(Job.Part(3, 4), True)) == {"part": {"width": 4}}
    earlier = {"part": {"limit": 3, "width": 4}, "overwrite": True}
    assert from_dict(Job, earlier) == from_dict(Job, {**earlier, "overwrite": "no bool"}) == Job(Job.Part(width=4))
    with pytest.raises(UsageError, match="unknown key 'overwite'"):
        from_dict(Job, {"overwite": True})


# ---- run directories ----


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_found_again_with_its_configuration(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a" / "b", "solver", to_dict(FULL))
    assert _files(run.path) == {"config.yaml", "env.json", ".lock"}
    assert Run.open(run.path, "solver") == run
    assert from_dict(Outer, Run.open(run.path, "solver").config) == FULL
    assert json.loads((run.path / "env.json").read_text())["packages"]["torch"] == metadata.version("torch")


def test_an_existing_run_stays_unless_overwritten(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", "solver", {"a": 1})
    checkpoints.save(run.checkpoints, 3, lambda folder: None)
    before = _files(run.path)
    with pytest.raises(UsageError, match="already holds a run"):
        Run.create(run.path, "solver", {"a": 2})
    assert _files(run.path) == before
    assert run.config == {"a": 1}
    with pytest.raises(DataError, match="is a run of kind 'solver'"):
        Run.create(run.path, "latent_model", {"a": 2}, overwrite=True)
    assert _files(run.path) == before
    again = Run.create(run.path, "solver", {"a": 2}, overwrite=True)
    assert _files(run.path) == {"config.yaml", "env.json", ".lock"}
    assert again.config == {"a": 2}


def test_the_current_directory_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    monkeypatch.chdir(run.path / "samples")
    with pytest.raises(UsageError, match="holds the current directory"):
        Run.create(run.path, "solver", {}, overwrite=True)
    assert (run.path / "config.yaml").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_never_deleted(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="no run directory"):
            Run.create(path, "solver", {}, overwrite=overwrite)
    assert _files(tmp_path) == {"thesis.tex", "file"}


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert Run.create(tmp_path, "solver", {}).config == {}


def test_nobody_else_locks_a_run_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    write, met = Run.write_config, list[bool]()

    def write_config(self: Run) -> None:
        met.append(is_locked(self.path))
        write(self)
        met.append(is_locked(self.path))

    monkeypatch.setattr(Run, "write_config", write_config)
    Run.create(run.path, "solver", {}, overwrite=True)
    Run.create(tmp_path / "new", "solver", {})
    assert met == [True] * 4
    with Run.creating(run.path, "solver", {}, resume=True):
        assert is_locked(run.path)
    assert not is_locked(run.path)


def is_locked(folder: Path) -> bool:
    try:
        with lock(folder):
            return False
    except UsageError:
        return True


@pytest.mark.parametrize("inner", [".", "solvers/amed", "report/cells"])
@pytest.mark.parametrize("flags", [{"overwrite": True}, {"resume": True}, {}])
def test_what_another_process_is_writing_is_not_deleted(inner: str, flags: dict[str, bool], tmp_path: Path) -> None:
    """Neither the run, nor a solver that is being learned or a sweep that is running in it."""
    run = Run.create(tmp_path / "r", "solver", {})
    checkpoints.save(run.checkpoints, 3, lambda folder: None)
    (run.path / inner).mkdir(parents=True, exist_ok=True)
    (run.path / inner / "file").touch()
    (run.path / inner / ".lock").touch()
    before = _files(run.path)
    with lock(run.path / inner):
        if "resume" in flags and inner != ".":
            assert Run.create(run.path, "solver", {}, **flags).path == run.path
        else:
            with pytest.raises(UsageError, match="by another process" if flags else "already holds a run"):
                Run.create(run.path, "solver", {}, **flags)
    assert _files(run.path) == before


def test_a_link_to_a_run_is_not_followed_to_delete_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    (tmp_path / "link").symlink_to(run.path)
    before = _files(run.path)
    with pytest.raises(UsageError, match="link is a link"):
        Run.create(tmp_path / "link", "solver", {}, overwrite=True)
    assert _files(run.path) == before
    assert Run.create(tmp_path / "link", "solver", {}, resume=True).config == {}


def test_what_a_run_needs_is_not_deleted_with_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    (run.path / "report" / "images").mkdir(parents=True)
    (run.path / "mine").mkdir()
    for values in ({"data": {"data": str(run.path / "report/images")}}, {"widths": [1, str(run.path / "env.json")]}):
        with pytest.raises(UsageError, match=r"holds .*(images|env.json)\n"):
            Run.create(run.path, "solver", values, overwrite=True)
    long = {"out": str(run.path), "options": "x" * 5000, "empty": "", "other": str(tmp_path)}
    long["data"] = str(run.path / "mine")
    assert Run.create(run.path, "solver", long, overwrite=True).config == long
    assert (run.path / "mine").exists()


def test_of_a_run_that_is_overwritten_what_is_the_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the new one cannot be made; the next start with --overwrite can."""
    run = Run.create(tmp_path / "r", "solver", {"a": 1})
    own = (
        "metrics.jsonl",
        "solvers/x/config.yaml",
        "report/cells/x",
        "latents-1-2.safetensors",
        "latents-0123abcd-4567cdef-crops10-bfloat16/manifest.json",
        "midway/events",
        "best/x",
    )
    mine = ("notes.md", "grid.png", "other/config.yaml", "other/checkpoints/x", "latents.safetensors", "latents-a-b/x")
    for name in (*own, *mine, f".log.txt.{NOBODY}.tmp"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskError):
        patch.setattr(runs, "environment", fail)
        Run.create(run.path, "solver", {"a": 2}, overwrite=True)
    assert _files(run.path) == {*mine, "config.yaml", ".lock"}
    assert Run.create(run.path, "solver", {"a": 3}, overwrite=True).config == {"a": 3}
    assert _files(run.path) == {*mine, "config.yaml", "env.json", ".lock"}


def test_a_run_whose_training_never_began_is_no_obstacle(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", "solver", {"a": 1})
    run.say("training")
    (run.path / f".env.json.{NOBODY}.tmp").touch()
    assert Run.create(run.path, "solver", {"a": 2}).config == {"a": 2}
    assert _files(run.path) == {"config.yaml", "env.json", ".lock"}
    assert Run.open(run.path, "solver").config == {"a": 2}


@pytest.mark.parametrize("kept", ["metrics.jsonl", "samples/a.png", "notes", "checkpoints/step-1/x", "posthoc/a"])
def test_anything_worth_keeping_is_an_obstacle(kept: str, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    (run.path / kept).parent.mkdir(parents=True, exist_ok=True)
    (run.path / kept).touch()
    with pytest.raises(UsageError, match="already holds a run"):
        Run.create(run.path, "solver", {})
    (run.path / kept).unlink()
    with pytest.raises(UsageError, match="already holds a run"):
        Run.create(run.path, "tokenizer", {})
    assert _files(run.path) == {"config.yaml", "env.json", ".lock"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no YAML")])
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a run"])
@pytest.mark.parametrize("point", ["write_yaml", "environment"])
def test_a_run_that_cannot_be_made_leaves_nothing(
    error: BaseException, there: str, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a" / "b"
    if there != "nothing":
        path.mkdir(parents=True)
    if there == "a run":
        Run.create(path, "solver", {})

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(runs, point, fail)
    with pytest.raises(DiskError if isinstance(error, OSError) else type(error)):
        Run.create(path, "solver", {}, overwrite=there == "a run")
    assert [p.name for p in tmp_path.rglob("*")] == ([] if there == "nothing" else ["a", "b"])
    monkeypatch.undo()
    assert Run.create(path, "solver", {}).path == path


def test_a_name_that_is_no_text_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        Run.create(tmp_path / "a\udcff", "solver", {})
    assert not list(tmp_path.iterdir())


def test_a_path_through_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="name a folder"):
        Run.create(tmp_path / "file" / "run", "solver", {})


def test_another_kind_of_run_and_no_run_are_data_errors(tmp_path: Path) -> None:
    Run.create(tmp_path / "r", "tokenizer", {})
    with pytest.raises(DataError, match=r"'tokenizer'.*\n.*'latent_model'") as caught:
        Run.open(tmp_path / "r", "latent_model")
    assert caught.value.exit_code == 3
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="not a run directory"):
            Run.open(path, "tokenizer")


def test_lines_are_appended_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    for step in (1, 2):
        run.log({"step": step})
        run.say(f"step {step}")
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (run.path / "log.txt").read_text() == capsys.readouterr().out == "step 1\nstep 2\n"


# ---- checkpoints ----


def test_a_run_without_a_checkpoint_raises(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    with pytest.raises(DataError, match="no checkpoint"):
        _ = run.checkpoint


def test_numbers_order_checkpoints(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", "solver", {})
    for step in (9, 10):
        checkpoints.save(run.checkpoints, step, lambda folder: None, keep=2)
    for name in ("step-x", ".step-99.1.tmp", ".step-99.1.old"):
        (run.checkpoints / name).mkdir()
    assert run.checkpoint.name == "step-10"


# ---- hashes ----


def test_a_hash_depends_on_description_name_shape_type_and_bytes_and_on_nothing_else() -> None:
    state = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    base = state_hash("d", state)
    assert len(base) == 12
    assert state_hash("d", {"b": state["b"], "a": state["a"].clone()}) == base
    assert state_hash("d", {**state, "a": torch.arange(12.0)[::2] / 2}) == base, "strides do not count"
    others = [
        state_hash("e", state),
        state_hash("d", {"c": state["a"], "b": state["b"]}),
        state_hash("d", {**state, "a": state["a"].view(2, 3)}),
        state_hash("d", {**state, "a": state["a"].view(torch.int32)}),
        state_hash("d", {**state, "a": state["a"].flip(0)}),
        state_hash("d", {"a": state["a"]}),
    ]
    assert len({base, *others}) == 7


def test_the_command_that_is_recorded_has_no_paths_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "--data",
        "/elsewhere/sets/cifar.zip",
        f"--out={tmp_path}/runs/a",
        "--x=/other/",
        "runs/b",
        "--lr=1e-3",
        "a b",
    ]
    monkeypatch.setattr("sys.argv", [str(tmp_path / "scripts" / "x.py"), *words])
    assert command_line() == ("python scripts/x.py --data cifar.zip --out=runs/a --x=other runs/b --lr=1e-3 'a b'")


@pytest.mark.parametrize(
    "text", ["445369751e07", "44536975e100", "1e5", "1e-3", "+1.5E2", "123456789012", "1_0", "no", "~"]
)
def test_a_text_that_looks_like_a_number_stays_a_text(text: str, tmp_path: Path) -> None:
    """Hashes are hexadecimal digits, and folders may have any name."""
    write_yaml(tmp_path / "a.yaml", {"hash": text, "rate": 1e-5, "large": 1e22})
    assert read_yaml(tmp_path / "a.yaml") == {"hash": text, "rate": 1e-5, "large": 1e22}


def test_a_hash_without_quotes_is_a_text_and_a_power_of_ten_a_number(tmp_path: Path) -> None:
    """As earlier versions wrote hashes, and as people write rates."""
    (tmp_path / "a.yaml").write_text("hash: 445369751e07\nrate: 1e-3\nmany: 2E6\nhalf: 5.e-1\n")
    assert read_yaml(tmp_path / "a.yaml") == {"hash": "445369751e07", "rate": 1e-3, "many": 2e6, "half": 0.5}
