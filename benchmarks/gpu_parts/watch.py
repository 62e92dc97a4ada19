"""A part ends with the driver that has started it, also where that one is killed."""

import os
import signal
import threading
import time


def end_with_parent() -> None:
    """Should the driver be killed, this process and those that it started end as well."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    if os.name == "posix" and os.getpgid(0) == os.getpid():
        threading.Thread(target=watch, daemon=True).start()
