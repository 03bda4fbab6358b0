"""save, load, send and receive for asyncio programs. The work itself is in threads.

    report = await vfiomig.aio.send([device], "tcp:[::1]:4444", on_event=print)

A data_fd cannot be waited on: epoll answers EPERM (linux/fs/eventpoll.c, for files without poll),
so there is nothing here that a loop could do by itself. on_event is called in the loop's thread,
some time after the event, and cannot end the work. To cancel the task cancels the work and waits
until it is rolled back; a result that came all the same is returned, and the device has moved.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TypeVar

from vfiomig import load as _loading
from vfiomig import save as _saving
from vfiomig.device import Device
from vfiomig.errors import CancelledError
from vfiomig.live.destination import receive as _receive
from vfiomig.live.options import ReceiveOptions, SendOptions
from vfiomig.live.source import send as _send
from vfiomig.options import LoadOptions, SaveOptions
from vfiomig.report import Event, MigrationReport, OnEvent, TransferReport
from vfiomig.transport import Target
from vfiomig.worker import Cancellation

T = TypeVar("T")


async def save(
    device: Device,
    target: Target,
    options: SaveOptions = SaveOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
) -> TransferReport:
    """Save, as vfiomig.save()."""
    return await _in_thread(
        lambda tell, stop: _saving(device, target, options, on_event=tell, cancellation=stop),
        on_event,
    )


async def load(
    source: Target,
    device: Device,
    options: LoadOptions = LoadOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
) -> TransferReport:
    """Load, as vfiomig.load()."""
    return await _in_thread(
        lambda tell, stop: _loading(source, device, options, on_event=tell, cancellation=stop),
        on_event,
    )


async def send(
    devices: Sequence[Device],
    url: str,
    options: SendOptions = SendOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
) -> MigrationReport:
    """Migrate devices to a receiver, as vfiomig.send()."""
    return await _in_thread(
        lambda tell, stop: _send(devices, url, options, on_event=tell, cancellation=stop),
        on_event,
    )


async def receive(
    devices: Sequence[Device],
    url: str,
    options: ReceiveOptions = ReceiveOptions(),  # noqa: B008  frozen
    *,
    on_event: OnEvent | None = None,
) -> MigrationReport:
    """Receive devices, as vfiomig.receive()."""
    return await _in_thread(
        lambda tell, stop: _receive(devices, url, options, on_event=tell, cancellation=stop),
        on_event,
    )


async def _in_thread(
    job: Callable[[OnEvent | None, Cancellation], T], on_event: OnEvent | None
) -> T:
    """Run job in a thread of its own: a pool's might all be at work on sessions that last."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()
    tell: OnEvent | None = None
    if on_event is not None:
        heard = on_event

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(heard, event)

    with closing(Cancellation()) as cancellation:

        def run() -> None:
            try:
                result = job(tell, cancellation)
            except BaseException as err:  # noqa: BLE001  raised where it is awaited
                loop.call_soon_threadsafe(outcome.set_exception, err)
            else:
                loop.call_soon_threadsafe(outcome.set_result, result)

        thread = threading.Thread(target=run, name="vfiomig aio")
        thread.start()
        try:
            return await _until(outcome, cancellation)
        finally:
            thread.join()


async def _until(outcome: "asyncio.Future[T]", cancellation: Cancellation) -> T:
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await asyncio.wait([outcome])
        except asyncio.CancelledError as err:
            cancelled = err
            cancellation.cancel()
            continue
        try:
            return outcome.result()
        except CancelledError as err:
            if cancelled is None:
                raise
            raise cancelled from err
