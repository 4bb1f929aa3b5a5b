"""The techniques that make trio_udp fast: for each, a function that switches it off in this process.

To add one, write a function that patches the package, and add it to ``TECHNIQUES``. It runs before the server starts,
and only in the process of that server. The results show the gain of each technique.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_udp._endpoints import Received, Route


def use_portable_engine() -> None:
    os.environ["TRIO_UDP_ENGINE"] = "portable"


def send_each_reply_at_once() -> None:
    from trio_udp._endpoints import Outbox

    Outbox.hold = lambda self: None  # type: ignore[method-assign]


def switch_segmentation_off() -> None:
    from trio_udp._endpoints.engines.linux import LinuxEngine
    from trio_udp._endpoints.engines.pktinfo import UDP_SEGMENT

    can_set = LinuxEngine._can_set
    LinuxEngine._can_set = (  # type: ignore[method-assign]
        lambda self, option, value: option != UDP_SEGMENT and can_set(self, option, value)
    )


def switch_coalescing_off() -> None:
    from trio_udp._endpoints.engines import coalescing

    coalescing.switch_on = lambda sock: None


def send_one_message_at_a_time() -> None:
    from trio_udp._endpoints.engines.linux import LinuxEngine

    send = LinuxEngine.send

    def send_singly(self: LinuxEngine, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        self._at_once = 1  # message, of perhaps many segments
        if len(routes) == 1 or routes[0] != routes[1]:
            payloads, sizes, routes = payloads[:1], sizes[:1], routes[:1]
        return send(self, payloads, sizes, routes)

    LinuxEngine.send = send_singly  # type: ignore[method-assign]


def decode_every_address() -> None:
    from trio_udp._endpoints.engines.linux import LinuxEngine

    receive = LinuxEngine.receive

    def receive_and_decode(self: LinuxEngine, batch: list[Received]) -> bool:
        drained = receive(self, batch)
        for _, route, _ in batch:
            self.peer_address(route)
        return drained

    LinuxEngine.receive = receive_and_decode  # type: ignore[method-assign]


def look_up_the_run_context() -> None:
    from trio_udp._endpoints import ServerTurn
    from trio_udp._trio import run_context

    ServerTurn.context = property(  # type: ignore[assignment,misc]
        lambda self: run_context(), lambda self, context: None
    )


def put_each_datagram_of_a_row() -> None:
    from trio_udp._inbox import Inbox

    def put_each(self: Inbox, payloads: list[bytes]) -> None:
        for payload in payloads:
            self.put(payload)

    Inbox.keep_row = put_each  # type: ignore[method-assign]


def wait_without_looking() -> None:
    from trio_udp._endpoints import _reader

    _reader.SHORT_WAIT = 0.0


TECHNIQUES: dict[str, Callable[[], None]] = {
    "Linux engine": use_portable_engine,
    "holding replies": send_each_reply_at_once,
    "sendmmsg for many": send_one_message_at_a_time,
    "segmentation (GSO)": switch_segmentation_off,
    "coalescing (GRO)": switch_coalescing_off,
    "raw addresses": decode_every_address,
    "run context at hand": look_up_the_run_context,
    "rows of one client": put_each_datagram_of_a_row,
    "looking before waiting": wait_without_looking,
}
