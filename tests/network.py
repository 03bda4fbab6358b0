"""Two network namespaces with a cable between them. Needs root and iproute2."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

# Of the namespaces alone.
HERE, THERE = "10.99.0.1", "10.99.0.2"


class Unavailable(Exception):
    """There can be no namespaces here. Says why."""


@dataclass(frozen=True)
class Network:
    """The namespaces' names. A prefix is what a command is run behind, to be in one."""

    here: str
    there: str
    link: str

    @property
    def prefix_here(self) -> list[str]:
        return ["ip", "netns", "exec", self.here]

    @property
    def prefix_there(self) -> list[str]:
        return ["ip", "netns", "exec", self.there]

    def set_link(self, state: str) -> None:
        """Pull the cable at this end, "down", or put it in again, "up"."""
        _ip("-n", self.here, "link", "set", self.link, state)


@contextmanager
def network() -> Iterator[Network]:
    """Make them; their names are this process's. Raises Unavailable."""
    pid = os.getpid()
    made = Network(f"vfiomig-{pid}-here", f"vfiomig-{pid}-there", f"vm{pid}h")
    far_link = f"vm{pid}t"
    with ExitStack() as stack:
        try:
            for name in (made.here, made.there):
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
            peer = ["peer", "name", far_link, "netns", made.there]
            _ip("link", "add", made.link, "netns", made.here, "type", "veth", *peer)
            for name, link, address in (
                (made.here, made.link, HERE),
                (made.there, far_link, THERE),
            ):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
                _ip("-n", name, "link", "set", link, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except FileNotFoundError as err:
            raise Unavailable("needs ip, of iproute2") from err
        except subprocess.CalledProcessError as err:
            reason = err.stderr.decode(errors="replace").strip()
            raise Unavailable(f"needs root, namespaces and veth: {reason}") from err
        yield made


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
