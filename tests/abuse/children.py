"""Processes that abuse the device: each must end by itself in time, or when it is killed."""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Generous: the lab stalls.
END_S = 30.0
KILLED_S = 60.0
WORD_S = 3.0
# A device with a limit on its rate may keep one from it for minutes.
WORD_S = 10.0
_FOUND = 3


Tell = Callable[[], None]
Work = Callable[[Tell], None]


class FoundError(AssertionError):
    """The device or the driver did what it must not."""


@dataclass
class Child:
    """A process. told: the reading end of what it says to its parent."""

    pid: int
    told: int
    ended: bool = False

    def wait_for_word(self) -> bool:
        """Wait until it has said something. False: it ended without a word, or is too slow."""
        ready, _, _ = select.select([self.told], [], [], WORD_S)
        return bool(ready) and os.read(self.told, 1) != b""

    def wait(self, end_s: float = END_S) -> None:
        """Wait for its end, and kill it if that takes too long; that is allowed."""
        status = self._wait(end_s)
        if status is None:
            self.kill()
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == _FOUND:
            raise FoundError("see what it said above")

    def must_end(self, what: str) -> None:
        """Wait for its end. Raises FoundError when it does not come."""
        if self._wait(KILLED_S) is None:
            raise FoundError(f"{what} does not end; it is in {self._where()}")

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            self.must_end("a process that was killed")

    def _wait(self, most_s: float) -> int | None:
        ends = time.monotonic() + most_s
        while time.monotonic() < ends:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = True
                os.close(self.told)
                return status
            time.sleep(0.005)
        return None

    def _where(self) -> str:
        stacks = Path(f"/proc/{self.pid}/task").glob("*/stack")
        return "\n".join(["", *(stack.read_text() for stack in stacks)])


def start(work: Work) -> Child:
    """Run work in a process of its own. It gets what says a word to the parent."""
    told, tell = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(tell)
        return Child(pid, told)

    def say() -> None:
        os.write(tell, b".")

    code = 0
    try:
        os.close(told)
        work(say)
    except BaseException:  # noqa: BLE001  a child must not go on as its parent
        traceback.print_exc()
        code = _FOUND
    finally:
        sys.stderr.flush()
        os._exit(code)
