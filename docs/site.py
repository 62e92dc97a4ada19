"""Hooks of the site (mkdocs.yml): pages that are not in docs/, and links that lead to them."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import api
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Pages at the top of the repository that the site holds too."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the API, and those of the project."""
    made = api.pages() | {name: (ROOT / name).read_text(encoding="utf-8") for name in PROJECT}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to the repository's top, and from there into docs/, as the site has them."""
    if page.file.src_path in PROJECT:
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\(\.\./([A-Z]+\.md)", r"](\1", markdown)
