"""Run the command lines that stdin holds as JSON, one after another in this process; write their exit codes and output."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path


def run(line: list[str]) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of `python *line`."""
    sys.argv, sys.path[0] = line, str(Path(line[0]).parent)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(line[0], run_name="__main__")
        except SystemExit as ended:
            return ended.code, out.getvalue(), err.getvalue()
    return None, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps([run(line) for line in json.load(sys.stdin)]))
