"""Messages between the bench and its two kinds of workers: objects, and descriptors with them."""

import os
import pickle
import socket
from typing import Any

from vfiomig.errors import MigrationError
from vfiomig.fd import OwnedFd

# One packet is one message; ours are some hundred bytes, an error's text included.
_LARGEST_BYTES, _MOST_FDS = 1 << 16, 4


class Post:
    """One end of a connection between two processes that trust each other. Owns its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    def pair(cls) -> tuple["Post", socket.socket]:
        """Return an end, and the socket to hand to the other process."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(near), far

    def send(self, message: object, *fds: int) -> None:
        """Send an object, an error among them, and copies of descriptors. Raises OSError."""
        if isinstance(message, MigrationError):
            message = _Raised(type(message), message.args, vars(message))
        socket.send_fds(self._socket, [pickle.dumps(message)], fds)

    def receive(self) -> tuple[Any, list[OwnedFd]]:
        """Wait for a message. Returns it, and descriptors, which the caller owns.

        Raises EOFError when the other process has gone. An error is returned, not raised.
        """
        data, fds, _, _ = socket.recv_fds(self._socket, _LARGEST_BYTES, _MOST_FDS)
        owned = [OwnedFd(fd) for fd in fds]
        for fd in fds:
            # recv_fds() of Python 3.11 drops its flags, MSG_CMSG_CLOEXEC among them.
            os.set_inheritable(fd, False)  # noqa: FBT003
        if not data:
            raise EOFError
        message = pickle.loads(data)
        if isinstance(message, _Raised):
            return message.error(), owned
        return message, owned

    def close(self) -> None:
        """Close the connection: the other end then receives EOFError."""
        self._socket.close()


class _Raised:
    """An exception on its way: its constructor wants more than its args say."""

    def __init__(
        self, kind: type[MigrationError], args: tuple[Any, ...], values: dict[str, Any]
    ) -> None:
        self._kind, self._args, self._values = kind, args, values

    def error(self) -> MigrationError:
        error = self._kind.__new__(self._kind, *self._args)
        vars(error).update(self._values)
        return error
