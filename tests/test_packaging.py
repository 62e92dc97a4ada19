"""Packaging: the mapping of folders, the wheel, no regular package called `tokenizers`, the order of imports, no pickle."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gen", "samplers", "tokenizers")
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}
FRONT = ROOT / "gen" / "front"
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
OPTIONAL = {
    "transformers",
    "timm",
    "torchmetrics",
    "torch_fidelity",
    "lpips",
    "peft",
    "matplotlib",
    "sklearn",
    "torchvision",
}
ROOMS = (
    "names",
    "core",
    "progress",
    "files",
    "data",
    "training",
    "metrics",
    "features",
    "baselines",
    "networks",
    "objectives",
    "diffusion",
    "distillation",
    "tokenizer",
    "priors",
    "foreign",
    "cards",
    "evaluation",
    "sweep",
    "report",
    "proving",
    "flags",
    "recipes",
    "trainings",
    "commands",
)
"""The rooms of gen/, bottom first."""
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of every import inside `tree`, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that the package that they cross is visible"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _on_import(body: list[ast.stmt]) -> Iterator[str]:
    """Imports that run when the module is imported: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _on_import(node.body)
            yield from _on_import(node.orelse)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _on_import(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _on_import(handler.body)


def _name(path: Path) -> str:
    """midway.gen.core.files of gen/core/files.py; the package itself is in gen/front."""
    if path.parent == FRONT:
        return "midway" if path.stem == "__init__" else f"midway.{path.stem}"
    return ".".join(("midway", *path.relative_to(ROOT).with_suffix("").parts))


def _room(name: str) -> int | None:
    """The place of a module's room in `ROOMS`; None outside gen/."""
    parts = name.split(".")
    return ROOMS.index(parts[2]) if parts[:2] == ["midway", "gen"] else None


def _module(name: str, modules: set[str]) -> str | None:
    """The module of ours that importing `name`, a module or something in one, imports."""
    return next((found for found in (name, name.rpartition(".")[0]) if found in modules), None)


def _weights_only(call: ast.Call) -> bool:
    return any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)


def _pickles(tree: ast.AST) -> set[str]:
    """Everything in `tree` that would read or write a pickle; torch.load(weights_only=True), which makes only tensors, may."""
    restricted = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _weights_only(node)}
    found = {name for name in _imports(tree) if name.split(".")[0] in PICKLES}
    found |= {name for name in _imports(tree) if name in ("torch.load", "torch.save")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found |= {ast.unparse(node)} - ({"torch.load"} if id(node) in restricted else set())
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.add("allow_pickle")
    return found


def _python(code: str) -> str:
    """What `python -c code` prints at the repository root, where '' is on sys.path."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


# ---- folders ----


def test_the_mapping_lists_every_folder_that_holds_modules() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert table["package-dir"] == {"midway": "gen/front"} | {f"midway.{name}": name for name in PACKAGES}
    holding = {"midway." + ".".join(path.parent.relative_to(ROOT).parts) for path in MODULES if path.parent != FRONT}
    assert sorted(table["packages"]) == sorted(holding | {"midway", "midway.gen"})
    outside = {"scripts", "tests", "benchmarks", "docs", "build", "runs"}
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")}
    assert {name for name in folders if not name.startswith(".")} - outside == set(PACKAGES)


def test_a_wheel_holds_every_file_of_the_folders(tmp_path: Path) -> None:
    """Modules and package data (styles and scripts of reports), under midway/ and nowhere else."""
    pytest.importorskip("setuptools", minversion="77")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    held = {path.relative_to(tmp_path / "tree") for path in (tmp_path / "tree").glob("*/**/*") if path.is_file()}
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", *map(str, options), str(tmp_path / "tree")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {f"midway/{path.as_posix().removeprefix('gen/front/')}" for path in held}


def test_the_folders_hold_no_init_and_gen_holds_rooms() -> None:
    for path in MODULES:
        if path.parent == FRONT:
            continue
        assert path.name != "__init__.py", f"{path} would hide an installed package of the same name"
        inside = path.relative_to(ROOT).parts
        assert inside[0] != "gen" or (len(inside) == 3 and inside[1] in ROOMS), f"{path} is in no room of gen/"


def test_rooms_and_files_are_small() -> None:
    for folder in {path.parent for path in MODULES if path.is_relative_to(ROOT / "gen")}:
        assert len([path for path in folder.iterdir() if path.name != "__pycache__"]) <= 16, folder
    for path in [*MODULES, *sorted((ROOT / "scripts").glob("*.py"))]:
        assert len(path.read_text().splitlines()) <= 300, path


def test_every_module_is_imported_from_its_folder() -> None:
    names = [_name(path) for path in MODULES]
    code = f"import importlib.util as u; [print(u.find_spec(name).origin) for name in {names!r}]"
    assert [Path(line).resolve() for line in _python(code).splitlines()] == [p.resolve() for p in MODULES]


def test_scripts_are_starters_of_every_command() -> None:
    """A file of a few lines for each module of a command, which reads no flag by itself."""
    from midway.gen.commands.main import COMMANDS

    assert SCRIPTS - {"start"} == {command.module.split(".")[1] for command in COMMANDS.values()}
    for path in (ROOT / "scripts").glob("*.py"):
        assert path.stem == "start" or len(path.read_text().splitlines()) <= 6, path


@pytest.mark.parametrize("name", PACKAGES)
def test_our_folder_is_never_the_regular_package_of_its_name(name: str) -> None:
    """With '' on sys.path `import tokenizers` must still find Hugging Face's, or at worst a namespace without code."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s and s.origin else '')"
    origin = _python(code)
    assert not origin or (ROOT / name) not in Path(origin).parents


def test_an_installed_package_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").write_text("Tokenizer = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import tokenizers; print(tokenizers.Tokenizer)"
    assert _python(code) == "theirs"


# ---- imports ----


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards(package: str) -> None:
    """scripts -> gen -> {samplers, tokenizers} -> torch."""
    allowed = {"gen": set(PACKAGES), "samplers": {"samplers"}, "tokenizers": {"tokenizers"}}[package]
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in _imports(_tree(path)):
            first, *rest = name.split(".")
            assert first not in SCRIPTS | set(PACKAGES) | {"scripts", "tests"}, f"{path}: {name}"
            assert first != "midway" or (rest and rest[0] in allowed), f"{path}: {name}"


def test_rooms_import_only_rooms_before_them() -> None:
    """Lazy imports and those for type checking included."""
    for path in MODULES:
        here = _room(_name(path))
        for name in _imports(_tree(path)):
            there = _room(name)
            assert here is None or there is None or there <= here, f"{path} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Lazy imports and those for type checking included."""
    names = {_name(path) for path in MODULES}
    graph = {_name(path): {_module(name, names) for name in _imports(_tree(path))} - {None} for path in MODULES}
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a cycle


@pytest.mark.parametrize("package", PACKAGES)
def test_optional_and_heavy_imports_stay_inside_functions(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        heavy = OPTIONAL & {name.split(".")[0] for name in _on_import(_tree(path).body)}
        assert not heavy, f"{path} imports {heavy} when it is imported"


def test_nothing_reads_or_writes_pickles() -> None:
    for path in [*MODULES, *sorted((ROOT / "scripts").glob("*.py"))]:
        assert not _pickles(_tree(path)), f"{path}: {_pickles(_tree(path))}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.save({}, 'x', weights_only=True)",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_pickle_test_sees_a_pickle(code: str) -> None:
    assert _pickles(ast.parse(code))
    assert not _pickles(ast.parse("torch.load('x', weights_only=True)"))


def test_the_import_test_sees_what_runs_and_only_that() -> None:
    code = """
try:
    import lpips
except ImportError:
    import peft
if TYPE_CHECKING:
    import matplotlib
class A:
    import sklearn
def f():
    import transformers
"""
    assert set(_on_import(ast.parse(code).body)) == {"lpips", "peft", "sklearn"}


@pytest.mark.parametrize(
    ("command", "needed", "others"),
    [
        ("trainings.train_tokenizer", "training.fit", "baselines evaluation report"),
        (
            "commands.evaluate",
            "sweep.run",
            "baselines training.fit tokenizer sweep.comparisons sweep.export sweep.repeats "
            "evaluation.diffusers evaluation.other_sources "
            "distillation.table distillation.amed",
        ),
    ],
)
def test_a_command_imports_what_its_main_path_needs(command: str, needed: str, others: str) -> None:
    """Of all modules that importing it imports; the others are imported where a flag needs them."""
    files = {_name(path): path for path in MODULES}
    found, new = set(), {f"midway.gen.{command}"}
    while new:
        found |= new
        imported = {_module(name, set(files)) for here in new for name in _on_import(_tree(files[here]).body)}
        new = {name for name in imported if name} - found
    assert f"midway.gen.{needed}" in found
    rooms = tuple(f"midway.gen.{name}" for name in others.split())
    assert not [name for name in found if name.startswith(rooms)]
    assert len([name for name in found if name.startswith("midway.gen")]) <= 126


def test_solvers_import_torch_and_no_framework() -> None:
    """The samplers can be used alone, and start in the time that torch takes."""
    heavy = ["diffusers", "torchvision", "accelerate", "transformers", "sklearn", "matplotlib", "scipy", "PIL"]
    code = f"import sys, midway.samplers.solvers; print([name for name in {heavy!r} if name in sys.modules])"
    assert _python(code) == "[]"
