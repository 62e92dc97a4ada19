"""One connection from every process of a program to the first, over which they exchange their statuses.

Once per tick a process sends a line of JSON, its status, to the first one; the answer holds the statuses of all. When a
connection ends and does not come back, so did its process. Unlike torch's store, which only holds the port, this does not block
where the first process is stopped; and unlike collective operations it does not depend on their backend.
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch import distributed

KEY = "midway/rollcall/{attempt}"
SEARCH = 0.2
"""Seconds between two looks for the first process."""
BEFORE, JOINING = -2, -1
"""Values of `Status.begun` before and while the process group is made."""


@dataclass(frozen=True)
class Status:
    """What is known of a process."""

    begun: int = BEFORE
    """Collective operations that it has begun."""
    work: str = ""
    """What it does while the others may wait for it."""
    code: int | None = None
    """Exit code of a process that is leaving."""
    beats: int = 0
    """Lines that it has sent."""
    gone: bool = False
    """Its connection ended."""


class Register:
    """The first process's side: a thread per connection."""

    def __init__(self) -> None:
        self._server = _listening()
        self.port: int = self._server.getsockname()[1]
        self._statuses = {0: Status()}
        self._connections: dict[int, socket.socket] = {}
        self._claimed: set[str] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        rank = None
        with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            lines = connection.makefile("rwb")
            while line := lines.readline(1 << 16):
                rank, claim, status = _parse(line)
                lines.write(self._answer(rank, claim, status, connection))
                lines.flush()
        with self._lock:
            if rank is not None and self._connections[rank] is connection:
                self._statuses[rank] = replace(self._statuses[rank], gone=True)

    def _answer(self, rank: int, claim: str, status: Status, connection: socket.socket) -> bytes:
        with self._lock:
            self._connections[rank] = connection
            beats = self._statuses[rank].beats + 1 if rank in self._statuses else 1
            self._statuses[rank] = replace(status, beats=beats)
            first = claim not in self._claimed
            self._claimed.add(claim)
            content = {"first": first, "statuses": {rank: asdict(its) for rank, its in self._statuses.items()}}
        return f"{json.dumps(content)}\n".encode()


def _parse(line: bytes) -> tuple[int, str, Status]:
    message = json.loads(line)
    return int(message["rank"]), str(message["claim"]), Status(**message["status"])


class Caller:
    """Every process's side; also the first one's. `answer`: seconds that an answer may take."""

    def __init__(self, rank: int, host: str, port: int, answer: float) -> None:
        self.rank, self.host, self.port, self.answer = rank, host, port, answer
        self._kept: tuple[object, ...] = ()
        self._found: int | None = None
        self._socket: socket.socket | None = None
        threading.Thread(target=self._search, daemon=True).start()

    def exchange(self, status: Status, claim: str = "") -> tuple[bool, dict[int, Status]]:
        """Whether nobody else has claimed `claim`, and the statuses of all. OSError without an answer, LookupError when the
        first process is not there yet."""
        try:
            connection = self._socket = self._socket or self._connect()
            message = {"rank": self.rank, "claim": claim, "status": asdict(status)}
            connection.sendall(f"{json.dumps(message)}\n".encode())
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline() or _closed())
        except (OSError, ValueError):
            self.close()
            raise
        return answer["first"], {int(rank): Status(**its) for rank, its in answer["statuses"].items()}

    def close(self) -> None:
        """End the connection; `exchange` makes another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        if self._found is None:
            raise LookupError("the first process has not come")
        connection = socket.create_connection((self.host if self.rank else "localhost", self._found), self.answer)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _search(self) -> None:
        """Find the port of the register by the store that the process group uses as well; in a thread, since a store waits."""
        key = KEY.format(attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher
        if self.rank == 0:
            with contextlib.suppress(
                OSError, RuntimeError
            ):  # of a port that is taken: the process group fails by it too
                store, register = self._open(hosts=not served), Register()
                store.set(key, str(register.port))
                self._kept, self._found = (store, register), register.port  # for as long as the program runs
        while self.rank and self._found is None:
            with contextlib.suppress(OSError, RuntimeError):
                socket.create_connection((self.host, self.port), self.answer).close()  # else the store complains
                store = self._open(hosts=False)
                while not store.check([key]):
                    time.sleep(SEARCH)
                self._found = int(store.get(key))
            time.sleep(SEARCH)

    def _open(self, hosts: bool) -> distributed.TCPStore:
        patience = timedelta(seconds=60)
        return distributed.TCPStore(
            self.host, self.port, None, hosts, timeout=patience, wait_for_workers=False, multi_tenant=True
        )


def _listening() -> socket.socket:
    """A server on a free port, of both versions of IP where there are two."""
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _closed() -> bytes:
    raise ConnectionResetError("the connection was closed")
