"""Text from outside (names of files, classes and runs, titles) in every output: one function per format.

    printable     messages, terminal, log    one line without control characters
    html          report.html
    markdown      report.md, model cards
    csv_field     results.csv                text, never a formula
    plot_label    matplotlib                 no mathematics, and a legend's entry whatever its first letter
    json_text     results.jsonl, records     JSON that UTF-8 can hold

YAML escapes by itself.
"""

import contextlib
import html as hypertext
import json
import re
import sys
import time
from typing import Any, TextIO

_UNSEEN = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(
    f"[{_UNSEEN}]"
)  # control characters, other line ends, changes of direction, bytes that are no text
_CONTROL_BUT_NEWLINE = re.compile(f"(?!\n)[{_UNSEEN}]")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|#~&$]|^[-+=]")
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")
_LABEL = 60  # letters of a plot; a longer name would push the axes out of it
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: object) -> str:
    """One line: control characters, line ends and undecodable bytes as escapes, `\\n` or `\\xff`."""
    return _CONTROL.sub(_escape, str(text))


def echo(*lines: object) -> None:
    """Print lines, each of which may hold line ends of its own."""
    for line in lines:
        write_line(printable_lines(line), sys.stdout)


_written = [time.monotonic()]


def last_written() -> float:
    """When the last line was written, on the clock of `time.monotonic`; at first when this module was imported."""
    return _written[0]


def write_line(text: str, stream: TextIO | None) -> None:
    """Write text and a line end in one piece, above the progress bars that are drawn; nothing where there is no stream."""
    if stream is None:
        return
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # what was not imported has drawn nothing
    drawn = bars is not None and bool(getattr(bars, "_instances", None))
    with bars.external_write_mode(file=stream) if bars and drawn else contextlib.nullcontext():
        stream.write(f"{text}\n")
        stream.flush()
    _written[0] = time.monotonic()


def printable_lines(text: object) -> str:
    """As `printable`, but line ends stay."""
    return _CONTROL_BUT_NEWLINE.sub(_escape, str(text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is not UTF-8
        code -= 0xDC00
    return chr(code).encode("unicode_escape").decode() if code < 0xD800 else f"\\u{code:04x}"


def html(text: object) -> str:
    """Text of an HTML element or attribute."""
    return hypertext.escape(printable(text))


def markdown(text: object) -> str:
    """Text that Markdown shows as it is, in one line, also inside a table or a heading."""
    shown = _MARKDOWN.sub(lambda found: f"\\{found.group()}", printable(" ".join(str(text).split())))
    return _NUMBERED.sub(r"\1\\\2", shown)


def csv_field(text: object) -> str:
    """A field that spreadsheets show as text: what they would compute has an apostrophe before it (OWASP)."""
    shown = printable(text)
    return f"'{shown}" if str(text).startswith(_FORMULA) else shown


def plot_label(text: object, most: int = _LABEL) -> str:
    """Text of a plot: `$` is no mathematics, and matplotlib leaves out of a legend what begins with an underscore.

    Cut to `most` letters.
    """
    shown = printable(text)
    shown = (shown if len(shown) <= most else f"{shown[: most - 1]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def json_text(value: Any, **options: Any) -> str:
    """Readable JSON; a byte that is no text is an escape in it, so that it can be UTF-8. `options` as of `json.dumps`."""
    return json.dumps(value, ensure_ascii=False, **options).encode(errors="backslashreplace").decode()
