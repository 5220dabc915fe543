"""Ranks that are actors of a Ray cluster: Ray places and starts them; plans go over a socket of our own.

    planning rank --- TCP: plans ---> actor 1 (its own machine, its own GPU), actor 2, ...
                  <-- answers, beats, a last word ---

Ray is asked once for each actor, for a placement group that keeps them near one another; no step is a call of Ray's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import orjson
import ray
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvarena.engine.errors import EngineError, KvarenaError
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.ranks.child import BEAT_SECONDS, Start, run_rank
from kvarena.engine.ranks.frames import receive_frame, send_frame
from kvarena.engine.ranks.peers import reason_of
from kvarena.engine.ranks.watch import Watched, WatchedPeers
from kvarena.engine.ranks.worker import RankFactory

PLACE_SECONDS = 60.0
_START_SECONDS = 120.0


class SocketInbox:
    """See `Inbox`: messages and answers over one socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._lock = sock, threading.Lock()

    def receive(self) -> bytes | None:
        """See `Inbox.receive`."""
        return receive_frame(self._sock)

    def answer(self, **values: Any) -> None:
        """See `Inbox.answer`."""
        self.say({"answer": values})

    def say(self, message: dict[str, Any]) -> None:
        """Send a frame; from any thread."""
        with self._lock:
            send_frame(self._sock, orjson.dumps(message))


class RankActor:
    """The actor of a rank: `run` ends with the rank."""

    def host(self) -> str:
        """The address on which others reach this machine."""
        return str(ray.util.get_node_ip_address())

    def run(self, rank: int, host: str, port: int) -> None:
        """Connect to the planning rank, and do what it says."""
        sock = socket.create_connection((host, port), timeout=_START_SECONDS)
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        inbox = SocketInbox(sock)
        inbox.say({"rank": rank})
        data = receive_frame(sock)
        if data is None:
            return
        threading.Thread(target=self._beat, args=(inbox,), name="heartbeat", daemon=True).start()
        try:
            run_rank(pickle.loads(data), inbox, self.host())
        except BaseException as error:
            reason, is_lost = reason_of(error)
            with contextlib.suppress(OSError):
                inbox.say({"error": reason, "is_lost": is_lost})
        finally:
            sock.close()

    @staticmethod
    def _beat(inbox: SocketInbox) -> None:
        with contextlib.suppress(OSError):
            while True:
                inbox.say({"beat": True})
                time.sleep(BEAT_SECONDS)


class _WatchedActors(Watched):
    """Actors, and what is known of them."""

    def __init__(self, layout: Layout, ends_process: bool) -> None:
        super().__init__(layout, ends_process)
        self.actors: list[Any] = []
        self.group: Any = None

    def why_ended(self, rank: int) -> str:  # noqa: ARG002
        """See `Watched.why_ended`."""
        return "its actor has ended, or its machine is gone"

    def name_of(self, rank: int) -> str:  # noqa: ARG002
        """See `Watched.name_of`."""
        return "its actor"

    def kill(self) -> None:
        """See `Watched.kill`."""
        for actor in self.actors:
            with contextlib.suppress(Exception):  # whatever Ray says of one that is gone
                ray.kill(actor)

    def wait(self) -> None:
        """See `Watched.wait`."""
        self.kill()
        if self.group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self.group)
            self.group = None


class ActorPeers(WatchedPeers):
    """The other ranks as actors of Ray; the cluster is that of RAY_ADDRESS, or one of this machine.

    Args:
        layout: of the planning rank, which is this process.
        factory: builds a rank in its actor; must pickle.
        device: cpu or cuda: each actor gets a core, and a GPU of its own.
        timeout: seconds after which a collective has failed.
        check_plans: see `Peers`.

    Raises:
        EngineError: the cluster has no room for the ranks.
        RankFailed: one has ended while it started.
    """

    def __init__(
        self, layout: Layout, factory: RankFactory, device: str, timeout: float, *, check_plans: bool = False
    ) -> None:
        watched = _WatchedActors(layout, ends_process=device == "cuda")
        super().__init__(layout, watched, timeout, check_plans=check_plans)
        weakref.finalize(self, watched.end)
        try:
            host, store = self._place(watched, factory, device, timeout)
        except Exception as error:
            watched.end()
            if isinstance(error, KvarenaError):
                raise
            raise EngineError(f"Ray cannot start {layout.world_size - 1} ranks: {reason_of(error)[0]}") from error
        self.meet(store, device, host)

    def _place(
        self, watched: _WatchedActors, factory: RankFactory, device: str, timeout: float
    ) -> tuple[str, dist.TCPStore]:
        layout = self.layout
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=True, configure_logging=False)
        needs = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        watched.group = placement_group([needs] * (layout.world_size - 1), strategy="PACK")
        if not watched.group.wait(PLACE_SECONDS):
            raise EngineError(
                f"Ray has found no room for {layout.world_size - 1} ranks of {needs} in {PLACE_SECONDS:g} s "
                f"({layout}); add nodes, or lower parallel.tensor_parallel_size"
            )
        kind = ray.remote(RankActor)
        env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
        for index in range(layout.world_size - 1):
            place = PlacementGroupSchedulingStrategy(watched.group, placement_group_bundle_index=index)
            watched.actors.append(
                kind.options(
                    num_cpus=1, num_gpus=needs.get("GPU", 0), scheduling_strategy=place, max_restarts=0,
                    runtime_env={"env_vars": env},
                ).remote()
            )  # fmt: skip
        host = str(ray.util.get_node_ip_address())
        with socket.create_server((host, 0)) as listener:
            listener.settimeout(_START_SECONDS)
            for rank, actor in enumerate(watched.actors, 1):
                actor.run.remote(rank, host, listener.getsockname()[1])
            found: dict[int, socket.socket] = {}
            while len(found) < len(watched.actors):
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                hello = receive_frame(sock)
                if hello is not None:
                    found[int(orjson.loads(hello)["rank"])] = sock
        watched.sockets = [found[rank] for rank in sorted(found)]
        store = dist.TCPStore(host, 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        for rank, sock in sorted(found.items()):
            start = Start(factory, layout.of(rank), device, host, store.port, timeout, 0.0)
            send_frame(sock, pickle.dumps(start))
        return host, store

    def send(self, message: bytes) -> None:
        """See `Peers.send`."""
        for rank, sock in enumerate(self.watched.sockets, 1):
            try:
                send_frame(sock, message)
            except OSError:
                self.watched.failed.wait(1.0)  # its watcher knows why
                self.fail(rank, "its connection is closed")
                self.check()
