"""Folders to share, with the same three verbs for every model, and the card that is in them.

    save_pretrained(folder)     weights, config.json and README.md, the card
    from_pretrained(folder)     the model again, by a folder or a Hub id
    push_to_hub("owner/name")   the folder in a repository of the Hub

A card is Markdown behind a header of YAML. A model keeps the card of the folder that it was loaded from, and gives it on.
"""

import re
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

LICENSE = "apache-2.0"
"""Identifier of the licence of what is trained here, unless another is given."""
CARD = "README.md"
_HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def header(license: str, tags: Sequence[str]) -> str:
    """The YAML before a card. ValueError for a licence that is no identifier."""
    return "\n".join(
        ["---", f"license: {checked(license)}", "library_name: midway", "tags:", *(f"- {t}" for t in tags), "---"]
    )


def card_of(title: str, license: str, tags: Sequence[str], facts: Mapping[str, object], usage: str) -> str:
    """A card: header, a table of facts, Python that loads the folder, and the licence. ValueError as `header`."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    parts = [header(license, tags), f"# {title}", f"| | |\n|---|---|\n{rows}", loading(usage), licence(license)]
    return "\n\n".join(parts) + "\n"


def loading(usage: str) -> str:
    """The section of a card with Python that loads it."""
    return f"## Loading, in this folder\n\n```python\n{usage}\n```"


def licence(license: str, note: str = "") -> str:
    """The section of a card with its licence, and a sentence on it."""
    return f"## Licence\n\n{checked(license)}{note}"


def checked(license: str) -> str:
    """`license`, if it is an identifier as the Hub has them; else ValueError."""
    if not _IDENTIFIER.fullmatch(license):
        raise ValueError(
            f"'{license}' is no identifier of a licence: give one such as {LICENSE}, mit, cc-by-4.0 or other"
        )
    return license


def relicensed(card: str, license: str) -> str:
    """The card with another licence in its header and its last section. ValueError as `header`."""
    found = _HEADER.match(card)
    lines = [] if found is None else [line for line in found[1].splitlines() if not line.startswith("license:")]
    body = card if found is None else card[found.end() :]
    body = re.sub(r"(?m)(^## Licence\n\n)\S+", lambda section: section[1] + checked(license), body)
    return "\n".join(["---", f"license: {checked(license)}", *lines, "---", body])


def upload(folder: Path, repo_id: str, message: str, private: bool | None, token: str | None) -> str:
    """Create the repository if there is none, upload the files of `folder` as one commit; its address. Errors of the Hub."""
    api = huggingface_hub.HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))


class Shared:
    """A model with `save_pretrained` and `push_to_hub`."""

    card: str | None = None
    """The README.md of the folder that it was loaded from; None for a model that was made here."""

    @abstractmethod
    def write(self, folder: Path, **options: Any) -> None:
        """Write weights and configuration into an existing folder."""

    @abstractmethod
    def own_card(self, license: str) -> str:
        """A card of what the model itself holds, for one that has none; ValueError as `header`."""

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, *, license: str | None = None, **options: Any
    ) -> None:
        """Write weights, config.json and README.md into a folder, which is made.

        license: identifier of the weights' licence; by default that of the card that the model was loaded with, else `LICENSE`.
        ValueError for one that is no identifier. options: of `write`; for a tokenizer diffusers', such as max_shard_size.
        """
        folder = Path(save_directory)
        card = self.own_card(license or LICENSE) if self.card is None else self.card
        card = card if self.card is None or license is None else relicensed(card, license)
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder, **options)
        (folder / CARD).write_text(card, encoding="utf-8")

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with midway",
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository "owner/name" of the Hub, which is made; the commit's address.

        token: by default the one of `hf auth login`. options: of `save_pretrained`. Errors of it and of huggingface_hub.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license=license, **options)
            return upload(Path(folder), repo_id, commit_message, private, token)


def card_in(folder: Path) -> str | None:
    """The card of a folder, None without one or where it cannot be read."""
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
