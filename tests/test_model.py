"""A whole server beside a model of it: whatever strangers do in whatever order, both do the same."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from trio_udp import Client, Limits, serve_endpoints
from trio_udp._endpoints import Address

from .conftest import check_adds_up, in_memory

STRANGERS = [("192.0.2.1", port) for port in range(1, 6)]
IDLE_TIMEOUT = 4
MAX_CLIENTS = 2


class Model:
    """What a server does, said in lists. Time passes in whole seconds, so that idle timeouts are never rounded."""

    def __init__(self, when_full: Literal["refuse", "evict_idle"]) -> None:
        self.evicts = when_full == "evict_idle"
        self.now = 0
        self.known: dict[Address, int] = {}  # since when each has been silent, the longest first
        self.conversations: list[tuple[Address, list[bytes]]] = []
        self.replies: list[tuple[Address, bytes]] = []
        self.expired = self.evicted = self.refused = self.errors = 0

    def put(self, source: Address, payloads: list[bytes]) -> None:
        if source not in self.known:
            if len(self.known) == MAX_CLIENTS and not self.evicts:
                self.refused += len(payloads)
                return
            if len(self.known) == MAX_CLIENTS:
                del self.known[next(iter(self.known))]
                self.evicted += 1
            self.conversations.append((source, []))
        self.known.pop(source, None)
        self.known[source] = self.now
        [*_, taken] = [taken for address, taken in self.conversations if address == source]
        taken += payloads
        if payloads[-1] in (b"return", b"close", b"raise"):
            del self.known[source]
            self.errors += payloads[-1] == b"raise"
            payloads = payloads[:-1]
        self.replies += [(source, payload) for payload in payloads]

    def wait(self, seconds: int) -> None:
        self.now += seconds
        for address, since in list(self.known.items()):
            if since + IDLE_TIMEOUT <= self.now:
                del self.known[address]
                self.expired += 1


# Most of them leave the conversation open, or the server would never be full.
bursts = st.builds(
    lambda words, last: [*words, last],
    st.lists(st.sampled_from([b"", b"1", b"2"]), max_size=5),
    st.sampled_from([b"3", b"3", b"3", b"3", b"return", b"close", b"raise"]),
)
steps = st.lists(st.tuples(st.sampled_from(STRANGERS), bursts) | st.integers(1, 2), min_size=5, max_size=40)


@settings(max_examples=150, deadline=None)
@given(steps=steps, when_full=st.sampled_from(["refuse", "evict_idle"]))
def test_a_server_does_what_its_model_does(
    steps: list[tuple[Address, list[bytes]] | int], when_full: Literal["refuse", "evict_idle"]
) -> None:
    """Who is known, what each handler call has taken, what was answered, and every count."""
    model = Model(when_full)
    conversations: list[tuple[Address, list[bytes]]] = []

    async def handler(client: Client) -> None:
        taken: list[bytes] = []
        conversations.append((client.peer_address, taken))
        async for payload in client:
            taken.append(payload)
            if payload == b"return":
                return
            if payload == b"close":
                client.close()
                return
            if payload == b"raise":
                raise ValueError("as asked")
            await client.send(payload)

    async def main() -> None:
        run = in_memory()
        options: dict[str, Any] = {
            "idle_timeout": IDLE_TIMEOUT,
            "limits": Limits(max_clients=MAX_CLIENTS, when_full=when_full),
            "on_error": lambda client, error: None,
        }
        async with trio.open_nursery() as nursery:
            server = await nursery.start(partial(serve_endpoints, handler, [run.endpoint], **options))
            for step in steps:
                if isinstance(step, int):
                    model.wait(step)
                    await trio.sleep(step)
                else:
                    source, payloads = step
                    model.put(source, payloads)
                    for payload in payloads:
                        run.put(payload, source)
                await run.settle()
                assert {client.peer_address for client in server.clients} == set(model.known)
                assert conversations == model.conversations
                assert run.sent == model.replies
                s = server.statistics()
                counts = (s.clients_expired, s.clients_evicted, s.refused_full, s.handler_errors)
                assert counts == (model.expired, model.evicted, model.refused, model.errors)
                check_adds_up(server)
            server.stop()

    trio.run(main, clock=MockClock(autojump_threshold=0))
