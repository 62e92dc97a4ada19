"""Folders of reports: only an earlier report of the same kind is replaced."""

import os
from collections.abc import Sequence
from pathlib import Path

from midway.gen.core.errors import UsageError


def check_replaceable(folder: Path, names: Sequence[str], own: bool) -> None:
    """UsageError if `folder` has files of these names that are not `own`, of an earlier report of this kind."""
    there = [name for name in names if os.path.lexists(folder / name)]
    if there and not own:
        raise UsageError(
            f"{folder / there[0]} is not of an earlier report of this kind",
            "it would be replaced",
            "choose another --out",
        )
