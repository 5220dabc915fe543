"""The process of a rank: it builds its part, does what the ring says, and ends with the process that started it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson

from kvarena.engine.importing import importing
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks.frames import receive_frame, send_frame
from kvarena.engine.ranks.ring import RingPage, RingReader

if TYPE_CHECKING:  # torch, which is imported when the process beats
    from kvarena.engine.ranks.worker import Inbox

BEAT_SECONDS = 0.2
FAILED = 1


@dataclass(frozen=True)
class Start:
    """What a rank's process is told first.

    Attributes:
        factory: builds the rank (`RankFactory`); must pickle.
        layout: where it stands.
        device: cpu or cuda; ranks of a machine take its GPUs in order.
        host, port: where the ranks meet.
        timeout: seconds after which a collective has failed.
        spin: see `RingReader`.
    """

    factory: Any
    layout: Layout
    device: str
    host: str
    port: int
    timeout: float
    spin: float


class RingInbox:
    """See `Inbox`: messages from the ring, answers over the socket."""

    def __init__(self, reader: RingReader, answers: socket.socket) -> None:
        self._reader, self._answers = reader, answers

    def receive(self) -> bytes | None:
        """See `Inbox.receive`."""
        return self._reader.receive()

    def answer(self, **values: Any) -> None:
        """See `Inbox.answer`."""
        send_frame(self._answers, orjson.dumps({"answer": values}))


def main(answers_file: int, bell_file: int, page_file: int) -> None:
    """The process's main function; does not return. All arguments are file descriptors."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers, bell = socket.socket(fileno=answers_file), socket.socket(fileno=bell_file)
    data = receive_frame(answers)
    if data is None:
        os._exit(FAILED)
    start: Start = pickle.loads(data)
    layout = start.layout
    page = RingPage(page_file, layout.world_size - 1)
    threading.Thread(target=_beat, args=(page, layout.rank - 1, os.getppid()), name="heartbeat", daemon=True).start()
    try:
        run_rank(start, RingInbox(RingReader(page, layout.rank - 1, bell, start.spin), answers), start.host)
    except BaseException as error:
        from kvarena.engine.ranks.peers import reason_of

        reason, is_lost = reason_of(error)
        with contextlib.suppress(OSError):
            send_frame(answers, orjson.dumps({"error": reason, "is_lost": is_lost}))
        os._exit(FAILED)
    os._exit(0)


def run_rank(start: Start, inbox: Inbox, host: str) -> None:
    """Build a rank and let it work until its inbox ends.

    Args:
        start: what it is.
        inbox: its messages.
        host: the address on which this rank is reached.
    """
    with importing():
        import torch
        import torch.distributed as dist

        from kvarena.engine.parallel.groups import Groups, arrive
        from kvarena.engine.ranks.worker import work

    device = torch.device("cpu")
    if start.device == "cuda":
        device = torch.device("cuda", start.layout.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = dist.TCPStore(start.host, start.port, None, False, timedelta(seconds=60))
    arrive(store, start.layout, lambda: None)
    groups = Groups(start.layout, store, device, host, start.timeout)
    rank = start.factory(groups)
    inbox.answer()
    work(rank, inbox)


def _beat(page: RingPage, reader: int, parent: int) -> None:
    """Say that this process runs, for as long as the one that started it does."""
    while True:
        page.beat(reader)
        if os.getppid() != parent:
            os._exit(FAILED)
        time.sleep(BEAT_SECONDS)
