"""Decide what becomes of devices whose migration ended without an end (exit code 21, a crash).

Without SESSION: lists the sessions that have a journal here. A source whose journal says that GO
was given runs again only if the destination never ran; so begin at the destination. There, a
session that has not run is forgotten for good. SESSION may be abbreviated to 4 digits or more.

examples:
  vfiomig resolve
  vfiomig resolve 3f2a9c
  vfiomig resolve 3f2a9c --via ssh:otherhost
  vfiomig resolve 3f2a9c --peer never-ran
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfiomig.cli import arguments, live_arguments
from vfiomig.cli.output import Output, printable, table
from vfiomig.cli.watch import Watch
from vfiomig.errors import OutcomeUnknownError, PeerError, UsageError
from vfiomig.live.journal import journal_directory, read_journal, sessions
from vfiomig.live.record import Record
from vfiomig.live.resolve import Resolution, check_peer, find, resolve
from vfiomig.live.verdict import Role, Verdict
from vfiomig.quantities import format_duration

# A result is a few hundred bytes; what is at the other end of ssh may be anything.
_LARGEST_ANSWER_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("session", metavar="SESSION", nargs="?")
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="where the journals are (default: /var/lib/vfiomig for root, else"
        " ~/.local/state/vfiomig)",
    )
    parser.add_argument(
        "--role", choices=list(map(str, Role)), help="which side, where both have been on this host"
    )
    words = parser.add_mutually_exclusive_group()
    words.add_argument(
        "--peer",
        choices=[str(Verdict.NEVER_RAN), str(Verdict.RAN)],
        help="what you know of the destination",
    )
    words.add_argument(
        "--peer-journal", type=Path, metavar="FILE", help="a copy of the other side's journal"
    )
    words.add_argument(
        "--via",
        type=arguments.typed(live_arguments.parse_via),
        metavar="ssh:HOST",
        help="resolve it at the other side first, through ssh (VFIOMIG_SSH: the command)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")


def run(args: argparse.Namespace, out: Output) -> int:
    """List, or resolve. Returns the exit code."""
    directory = args.journal or journal_directory()
    if args.session is None:
        _list(directory, out)
        return 0
    records = find(args.session, directory)
    role = Role(args.role) if args.role else None
    own = Role.SOURCE if Role.SOURCE in records and role is not Role.DESTINATION else None
    side = own or role or Role.DESTINATION
    if args.peer and side is not Role.SOURCE:
        raise UsageError(
            "--peer is what is known of the destination, and its journal is this one",
            hint="say it at the source; here, --peer-journal takes the source's journal",
        )
    session = next(iter(records.values())).session
    with Watch(out) as watch:
        done = resolve(
            session,
            role=role,
            directory=directory,
            peer=_peer(args, session, side, out),
            dry_run=args.dry_run,
            on_event=watch,
        )
    out.answer({**_values(done), "dry_run": args.dry_run}, _text(done, dry_run=args.dry_run))
    return 0


def _list(directory: Path, out: Output) -> None:
    found = sessions(directory)
    head = ("SESSION", "ROLE", "LAST", "VERDICT", "AGE", "DEVICES")
    rows = [head, *map(_row, found)]
    text = table(rows) if found else f"no session has a journal in {directory}"
    values = [_record_values(record) for record in found]
    out.answer({"journal": str(directory), "sessions": values}, text)


def _row(record: Record) -> tuple[str, ...]:
    verdict = "at work" if record.is_live and not record.is_final else str(record.verdict)
    last = record.events[-1].event if record.events else "-"
    age = format_duration(record.age_ns)
    return record.session, str(record.role), last, verdict, age, " ".join(record.devices)


def _record_values(record: Record) -> dict[str, Any]:
    return {
        "session": record.session,
        "role": record.role,
        "verdict": record.verdict,
        "is_final": record.is_final,
        "is_live": record.is_live,
        "damage": record.damage or None,
        "age_ns": record.age_ns,
        "devices": record.devices,
        "events": [{"at": event.at, "event": event.event} for event in record.events],
    }


def _peer(args: argparse.Namespace, session: str, side: Role, out: Output) -> Verdict | None:
    """Return the other side's verdict by whatever way was asked for; None if there was none."""
    if args.peer:
        return Verdict(args.peer)
    if args.peer_journal:
        return check_peer(read_journal(args.peer_journal), session, side)
    if args.via:
        other = Role.DESTINATION if side is Role.SOURCE else Role.SOURCE
        return _asked(args.via, session, other, out, dry_run=args.dry_run)
    return None


def _asked(host: str, session: str, role: Role, out: Output, *, dry_run: bool) -> Verdict | None:
    """Have the other host resolve its side. Returns what came of it, None if it does not know."""
    import shlex
    import subprocess

    command = [*shlex.split(os.environ.get("VFIOMIG_SSH", "ssh")), host]
    command += ["vfiomig", "resolve", session, "--role", str(role), "--json"]
    command += ["--dry-run"] if dry_run else []
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    except OSError as err:
        raise PeerError(f"cannot run {command[0]}: {err.strerror}", errno=err.errno) from err
    with process:
        assert process.stdout is not None
        answer = process.stdout.read(_LARGEST_ANSWER_BYTES)
        process.stdout.close()  # whoever says more than that ends by SIGPIPE
    plain = _last(answer, host, process.returncode)
    if process.returncode == OutcomeUnknownError.code:
        out.note(f"{host}: {plain.get('message')}")
        return None
    if process.returncode != 0:
        raise PeerError(
            f"{host}: {plain.get('message', f'exit code {process.returncode}')}",
            hint=str(plain.get("hint") or ""),
        )
    if plain.get("session") != session or plain.get("verdict") not in list(Verdict):
        raise PeerError(f"{host} does not say what became of session {session}")
    return Verdict(plain["verdict"])


def _last(answer: bytes, host: str, code: int) -> Mapping[str, Any]:
    """Return the last document that the other side printed. Raises PeerError."""
    lines = answer.splitlines()
    try:
        plain = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise PeerError(
            f"{host} gave no answer (exit code {code})",
            hint=f"vfiomig has to be installed there, and ssh {printable(host)} has to work",
        )
    return plain


def _values(done: Resolution) -> dict[str, Any]:
    return {
        "session": done.session,
        "role": done.role,
        "was": done.was,
        "verdict": done.verdict,
        "devices": [{"name": name, "state": state or None} for name, state in done.devices],
        "did": done.did,
        "destination": _values(done.destination) if done.destination else None,
    }


def _text(done: Resolution, *, dry_run: bool) -> str:
    lines = [_text(done.destination, dry_run=dry_run)] if done.destination else []
    would = "would be: " if dry_run else ""
    lines.append(f"session {done.session}, {done.role}: {would}{done.verdict}: {done.did}")
    lines += [f"  {name} is {state}" for name, state in done.devices if state]
    return "\n".join(lines)
