"""A Unix socket at which a process lends the devices it has open: both ends.

Each way one packet (SOCK_SEQPACKET), one line of JSON: {"op": "borrow", "name": "0000:3b:00.2"}, or
null for the only device, or {"op": "list"}. The answer: {"ok": true, "name": ..., "identity":
{...}} with the device_fd as SCM_RIGHTS; {"ok": true, "names": [...]}; {"ok": false, "error": ...,
"code": exit code}. Not checked here: whether what came is a device; device_from_fd() does that.
"""

import array
import errno
import json
import logging
import os
import select
import socket
import stat
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Self

from vfiomig.errors import (
    AccessError,
    DeviceBusyError,
    LocalIOError,
    MigrationError,
    NoSuchDeviceError,
    PeerError,
    UsageError,
    opening_failed,
)
from vfiomig.fd import OwnedFd
from vfiomig.identity import Identity

MESSAGE_BYTES = 4096  # of a whole message, its newline included
TIMEOUT_S = 5.0  # how long either side waits for the other
_LIST_BYTES = MESSAGE_BYTES - 512  # leaves room for the words around the names in an error
_RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
_UCRED = struct.Struct("=iII")  # struct ucred of include/linux/socket.h: pid, uid, gid
_BY_CODE = {str(kind.code): kind for kind in (UsageError, AccessError, NoSuchDeviceError)}

_log = logging.getLogger(__name__)
Lendable = tuple[str, Identity, int]  # name, identity, device_fd, which stays the owner's
Message = dict[str, object]


def borrow(path: str, wanted: str | None = None) -> tuple[str, Identity, OwnedFd]:
    """Borrow the device of that name at a socket, None for the only one. Waits for 5 s at most.

    Returns its name, identity and device_fd, which is the caller's. Raises UsageError,
    NoSuchDeviceError, AccessError, or PeerError for a bad lender, with nothing left open.
    """
    reply, [device_fd] = _ask(path, {"op": "borrow", "name": wanted}, descriptors=1)
    name, identity = reply.get("name"), _parse_identity(reply.get("identity"))
    if reply.keys() != {"ok", "name", "identity"} or not _tidy(name) or identity is None:
        device_fd.close()
        raise PeerError(f"{path}: the answer does not say what was lent")
    return str(name), identity, device_fd


def lent_names(path: str) -> tuple[str, ...]:
    """Return the names of the devices that are lent at a socket. Raises as borrow() does."""
    reply, _ = _ask(path, {"op": "list"}, descriptors=0)
    names = reply.get("names")
    if reply.keys() != {"ok", "names"} or not isinstance(names, list) or not all(map(_tidy, names)):
        raise PeerError(f"{path}: the answer is not a list of names")
    return tuple(names)


class Lender:
    """Lends open devices to this user and to root, at a socket of mode 0600.

    Borrows the descriptors: their owner keeps them open while serve() runs. serve() in one thread;
    stop() from any thread or signal handler; close(), or the end of with, after serve() returned.
    """

    def __init__(
        self, devices: Sequence[Lendable], socket_path: Path, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Create the socket. Raises UsageError, DeviceBusyError (served already), LocalIOError."""
        self._devices = {name: (identity, fd) for name, identity, fd in devices}
        self._path, self._timeout_s = socket_path, timeout_s
        if not devices or len(self._devices) != len(devices):
            raise UsageError("lend at least one device, and each only once")
        if len(_encode({"ok": True, "names": list(self._devices)})) > _LIST_BYTES:
            raise UsageError("too many devices for one socket", hint="use several sockets")
        with ExitStack() as made:
            self._wake = made.enter_context(OwnedFd(os.eventfd(0)))
            self._listener = made.enter_context(_listen(socket_path))
            self._node = os.lstat(socket_path)
            made.pop_all()

    def serve(self) -> None:
        """Answer one client after the other until stop(). No client can end it; they are logged."""
        while self._readable(self._listener.fileno(), None):
            try:
                client, _ = self._listener.accept()
            except OSError as err:
                _log.warning("%s: cannot accept a client: %s", self._path, err)
                # Without descriptors or memory the client stays in the queue: do not spin.
                self._readable(self._wake.fileno(), 1.0)
                continue
            with client:
                self._answer(client)

    def stop(self) -> None:
        """Make serve() return, now or as soon as it is called."""
        if (wake_fd := self._wake.fileno()) != -1:
            os.eventfd_write(wake_fd, 1)

    def close(self) -> None:
        """Remove the socket, if it is still ours. Descriptors that were lent stay open."""
        if self._listener.fileno() == -1:
            return
        try:
            if os.path.samestat(os.lstat(self._path), self._node):
                os.unlink(self._path)
        except OSError as err:
            _log.warning("%s: cannot remove the socket: %s", self._path, err)
        self._listener.close()
        self._wake.close()

    def _readable(self, fd: int, timeout_s: float | None) -> bool:
        """Wait for fd. False when the time is up, and at once after stop()."""
        waiter = select.poll()
        waiter.register(fd, select.POLLIN)
        waiter.register(self._wake.fileno(), select.POLLIN)
        ready = waiter.poll(None if timeout_s is None else timeout_s * 1000)
        return bool(ready) and all(found != self._wake.fileno() for found, _ in ready)

    def _answer(self, client: socket.socket) -> None:
        try:
            if not self._readable(client.fileno(), self._timeout_s):
                raise TimeoutError("it said nothing")
            client.settimeout(self._timeout_s)
            # Read before refusing: a close with data unread takes the answer from the client.
            if not (request := client.recv(MESSAGE_BYTES + 1)):
                return  # it only looked whether somebody serves here
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            reply, lent = self._reply(request, _UCRED.unpack(credentials)[1])
            rights = [(*_RIGHTS, array.array("i", [fd])) for fd in lent]
            client.sendmsg([_encode(reply)], rights, socket.MSG_NOSIGNAL)
        except OSError as err:
            _log.warning("%s: a client could not be served: %s", self._path, err)

    def _reply(self, request: bytes, uid: int) -> tuple[Message, list[int]]:
        if uid not in (os.geteuid(), 0):
            return self._refusal(AccessError, f"user {uid} may not borrow from user {os.geteuid()}")
        try:
            op, name = _parse_request(request)
        except ValueError as err:
            return self._refusal(UsageError, f"bad request: {str(err)[:200]}")
        if op == "list":
            return {"ok": True, "names": list(self._devices)}, []
        names = ", ".join(self._devices)
        if name is None and len(self._devices) > 1:
            return self._refusal(UsageError, f"add #NAME to the socket's path, one of {names}")
        name = next(iter(self._devices)) if name is None else name
        if name not in self._devices:
            return self._refusal(NoSuchDeviceError, f"not lent here; there is {names}")
        identity, device_fd = self._devices[name]
        return {"ok": True, "name": name, "identity": asdict(identity)}, [device_fd]

    def _refusal(self, kind: type[MigrationError], reason: str) -> tuple[Message, list[int]]:
        _log.warning("%s: refused a client: %s", self._path, reason)
        return {"ok": False, "error": reason, "code": kind.code}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(path: str, request: Message, *, descriptors: int) -> tuple[Message, list[OwnedFd]]:
    """Ask a lender. Returns its answer, and as many descriptors, which are the caller's."""
    with ExitStack() as received:
        data, flags, sent = _exchange(path, request)
        owned = [received.enter_context(device_fd) for device_fd in sent]
        try:
            reply = _decode(data)
        except ValueError as err:
            raise PeerError(f"{path}: the answer is not of a lender: {err}") from err
        if reply.get("ok") is not True:
            kind, reason = _BY_CODE.get(str(reply.get("code")), PeerError), reply.get("error")
            raise kind(f"{path}: {reason if _tidy(reason) else ascii(reason)}", device=path)
        if len(owned) != descriptors or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise PeerError(f"{path}: expected {descriptors} descriptors, got others or more")
        received.pop_all()
        return reply, owned


def _exchange(path: str, request: Message) -> tuple[bytes, int, list[OwnedFd]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as lender:
        lender.settimeout(TIMEOUT_S)
        # Room for two descriptors: a second one is seen, and refused, not silently dropped.
        space, cloexec = socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC
        try:
            lender.connect(path)
            lender.sendmsg([_encode(request)], [], socket.MSG_NOSIGNAL)
            data, control, flags, _ = lender.recvmsg(MESSAGE_BYTES, space, cloexec)
        except OSError as err:
            raise _asking_failed(path, err) from err
    rights = b"".join(data for *what, data in control if tuple(what) == _RIGHTS)
    return data, flags, [OwnedFd(fd) for (fd,) in struct.iter_unpack("=i", rights)]


def _asking_failed(path: str, err: OSError) -> MigrationError:
    if isinstance(err, TimeoutError):
        return PeerError(f"{path}: the lender said nothing for {TIMEOUT_S:g} s", device=path)
    if err.errno is None:  # CPython's own: the path does not fit into struct sockaddr_un
        return UsageError(f"{path}: {err}", device=path)
    if err.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.EPROTOTYPE):
        reason = f"{path}: nobody lends devices there: {err.strerror}"
        return NoSuchDeviceError(reason, errno=err.errno, hint="vfiomig hold lends devices")
    if err.errno in (errno.EACCES, errno.EPERM):
        return opening_failed(path, err, "only the user who runs the lender, and root, may borrow")
    return PeerError(f"{path}: {err.strerror}", device=path, errno=err.errno)


def _parse_request(data: bytes) -> tuple[str, str | None]:
    """Return what a client asks, "list" or "borrow", and the device's name. Raises ValueError."""
    request = _decode(data)
    op, name = request.get("op"), request.get("name")
    if request == {"op": "list"}:
        return "list", None
    if op == "borrow" and request.keys() == {"op", "name"} and (name is None or _tidy(name)):
        return "borrow", None if name is None else str(name)
    raise ValueError("expected op borrow with a name or null, or op list")


def _parse_identity(found: object) -> Identity | None:
    """Return the identity a lender tells, None when it is not one."""
    known = {field.name for field in fields(Identity)}
    if not isinstance(found, dict) or not {"driver"} <= found.keys() <= known:
        return None
    return Identity(**found) if all(map(_tidy, found.values())) else None


def _tidy(text: object) -> bool:
    """Whether text may be printed: in another process's words nothing may steer a terminal."""
    return isinstance(text, str) and text.isprintable()


def _encode(message: Message) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


def _decode(data: bytes) -> Message:
    """Return the object in one line of JSON. Raises ValueError, whatever the bytes are."""
    if len(data) > MESSAGE_BYTES or data.find(b"\n") != len(data) - 1:
        raise ValueError(f"not one line of at most {MESSAGE_BYTES} bytes")
    try:
        message = json.loads(data.decode("utf-8"), object_pairs_hook=_without_doubles)
    except RecursionError as err:
        raise ValueError("nested too deeply") from err
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def _without_doubles(pairs: list[tuple[str, object]]) -> Message:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _listen(path: Path) -> socket.socket:
    with ExitStack() as made:
        listener = made.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        try:
            bind_privately(listener, os.fspath(path))
            listener.listen()
            listener.settimeout(0)
        except OSError as err:
            reason = f"{path}: cannot create the socket: {err.strerror or err}"
            raise LocalIOError(reason, errno=err.errno) from err
        made.pop_all()
        return listener


def bind_privately(listener: socket.socket, path: str) -> None:
    """Bind a UNIX socket at path, for this user and root: mode 0600. Raises OSError.

    What a process of ours left there when it was killed is removed, and nothing else: LocalIOError,
    DeviceBusyError when somebody serves there.
    """
    # The node gets the mode of the socket's own inode (unix_bind_bsd, net/unix/af_unix.c): it is
    # never wider. The umask belongs to the whole process; it may only take more.
    os.fchmod(listener.fileno(), 0o600)
    _make_room(path, listener.type)
    listener.bind(path)
    os.chmod(path, 0o600)


def _make_room(path: str, kind: int) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK((node := os.lstat(path)).st_mode) or node.st_uid != os.geteuid():
        raise LocalIOError(f"{path} exists, and is no socket of ours", errno=errno.EEXIST)
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(0)
        # EAGAIN is a full queue, EPROTOTYPE another kind of server: somebody lives there.
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise DeviceBusyError(f"{path}: somebody serves there already", errno=errno.EADDRINUSE)
    os.unlink(path)
