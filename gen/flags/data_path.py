"""The flag of commands that read the images of a run."""

from dataclasses import dataclass, field

from midway.gen.core.config import PER_CALL


@dataclass(frozen=True, kw_only=True)
class DataPathFlag:
    """Where the images of a run are now."""

    data_path: str | None = field(default=None, metadata=PER_CALL)
    """Where the images of the run are, if they are no longer where it was trained on them; their fingerprint must be the recorded
    one."""
