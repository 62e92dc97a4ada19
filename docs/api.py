"""Pages of the API as Markdown, from the docstrings of the source alone: nothing is imported, so the site builds without torch.

Tools for documentation look for `__init__.py`, which the folders of Midway do not have (ARCHITECTURE.md).
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "samplers": "schedule prediction grids table solvers sample guidance hub loading sampler card parallel interop "
    "diffusers_scheduler",
    "tokenizers": "tokenizer hub pretrained base quantizers networks losses tiling",
    "gen": "diffusion.model diffusion.description diffusion.load diffusion.sampling data.images data.sources data.splits "
    "data.pictures metrics.moments metrics.frechet metrics.kid metrics.sliced metrics.psnr_ssim features.extractor",
}
"""Modules on a page of each package."""
Definition = ast.FunctionDef | ast.ClassDef


@cache
def tree(module: str) -> ast.Module:
    """The source of `midway.samplers.table`, parsed."""
    return ast.parse((ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")).read_text(encoding="utf-8"))


def pages() -> dict[str, str]:
    """Markdown by the name of its page: the names of `from midway import ...`, and modules by package."""
    found = {f"api/{package}.md": "\n".join(_page(package, names.split())) for package, names in PAGES.items()}
    return {"api/index.md": "\n".join(_front()), **found}


def names() -> dict[str, str]:
    """`NAMES` of the package: what it offers, and the module that has it."""
    body = ast.parse((ROOT / "gen" / "front" / "__init__.py").read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES":
            return ast.literal_eval(node.value)
    raise LookupError("gen/front/__init__.py has no NAMES")


def _front() -> Iterator[str]:
    modules = ", ".join(f"[{package}]({package}.md)" for package in PAGES)
    yield f"# API\n\nWhat `from midway import ...` offers. Modules: {modules}.\n"
    for name, module in names().items():
        yield f"## {name}\n\n`from midway import {name}`, of `{module}`.\n"
        source = _source(module, name)
        yield from _described(_find(source, name), source)


def _page(package: str, modules: list[str]) -> Iterator[str]:
    yield f"# midway.{package}\n"
    for name in modules:
        module = f"midway.{package}.{name}"
        yield f"## {name}\n\n`{module}`\n\n{prose(ast.get_docstring(tree(module)) or '')}\n"
        for node in tree(module).body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield f"### {node.name}\n"
                yield from _described(node, module)


def _source(module: str, name: str) -> str:
    """The module that defines the name, which `module` may import."""
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _source(str(node.module), name)
    return module


def _find(module: str, name: str) -> ast.stmt:
    for node in tree(module).body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if getattr(node, "name", None) == name or (target is not None and ast.unparse(target) == name):
            return node
    raise LookupError(f"{module} has no {name}")


def _described(node: ast.stmt, module: str) -> Iterator[str]:
    """Signature and docstring; of a class its fields and public methods too, those of bases of ours included."""
    if isinstance(node, ast.FunctionDef):
        yield f"```python\n{signature(node)}\n```\n\n{prose(ast.get_docstring(node) or '')}\n"
    elif isinstance(node, ast.ClassDef):
        yield f"```python\nclass {node.name}\n```\n\n{prose(ast.get_docstring(node) or '')}\n"
        yield from _fields(node)
        seen: set[str] = set()
        for owner in _family(node, module):
            for part in owner.body:
                if isinstance(part, ast.FunctionDef) and part.name not in seen and _is_public(part):
                    seen.add(part.name)
                    text = prose(ast.get_docstring(part) or "").replace("\n", "\n    ")
                    yield f"- **{part.name}** `{signature(part)}`\n\n    {text}\n"
    else:
        yield f"A value: `{ast.unparse(node)[:60].split(' = ')[0]}`.\n"


def _family(node: ast.ClassDef, module: str) -> Iterator[ast.ClassDef]:
    """The class, then its bases that are classes of ours."""
    yield node
    bases = {ast.unparse(base) for base in node.bases}
    for line in tree(module).body:
        if isinstance(line, ast.ImportFrom) and (line.module or "").startswith("midway."):
            for base in bases & {alias.name for alias in line.names}:
                found = _find(str(line.module), base)
                assert isinstance(found, ast.ClassDef)
                yield from _family(found, str(line.module))


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Annotated fields with their defaults, and the text under each."""
    for part, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield f"- `{ast.unparse(part)}` {prose(' '.join(str(text).split()))}"
    yield ""


def _is_public(part: ast.FunctionDef) -> bool:
    return not part.name.startswith("_") and ast.get_docstring(part) is not None


def signature(node: ast.FunctionDef) -> str:
    """`name(arguments) -> result`, of a property its name and type, on one line."""
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return f"{node.name}{result.replace(' -> ', ': ')}"
    return f"{node.name}({ast.unparse(node.args)}){result}"


def prose(text: str) -> str:
    """A docstring as Markdown: indented lines are code already, in others all but `code` is text."""
    lines = [line if line.startswith("    ") else _escaped(line) for line in text.splitlines()]
    return re.sub(r"(?m)^(\S.*)\n(    )", r"\1\n\n\2", "\n".join(lines))


def _escaped(line: str) -> str:
    parts = line.split("`")
    text = [re.sub(r"([*_\[\]])", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    return "`".join(text[i // 2] if i % 2 == 0 else part for i, part in enumerate(parts))
