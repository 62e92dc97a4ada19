"""The number of a process that is not there."""

NOBODY = 4194305
"""Above the largest of Linux, 4194304."""
