"""A CoAP server (RFC 7252) with observable resources (RFC 7641) and blockwise transfer in both directions (RFC 7959).

Both sides send requests: the client requests resources, and the server sends notifications that the client has to
acknowledge. So one task receives all messages of a client, each request has its own task, and an ACK wakes the task
that waits for it. aiocoap reads and writes the messages (its network code is not used). With ``--cert`` the same
handler runs over DTLS.

    python examples/coap_server.py --host 127.0.0.1 5683
    coap-client-notls -m put -e hello coap://127.0.0.1/note
    coap-client-notls -s 10 coap://127.0.0.1/note           (prints each change for ten seconds)

``/slow`` answers after two seconds. All other paths can be written, read, observed and deleted.
"""

import argparse
import logging
import math
import random
import signal
from collections import OrderedDict
from functools import partial
from itertools import count

import attrs
import trio
from aiocoap import ACK, CON, NON, RST, Message
from aiocoap.error import Error
from aiocoap.numbers.codes import (
    BAD_OPTION,
    CHANGED,
    CONTENT,
    CONTINUE,
    CREATED,
    DELETE,
    DELETED,
    EMPTY,
    GET,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    PUT,
    REQUEST_ENTITY_INCOMPLETE,
    REQUEST_ENTITY_TOO_LARGE,
    SERVICE_UNAVAILABLE,
    Code,
)

import trio_udp

UNDERSTOOD = {3, 7, 11, 15, 17, 23, 27}  # critical options: Uri-Host, -Port, -Path, -Query, Accept, Block2, Block1
ACK_AFTER = 0.5  # seconds until the server sends an empty ACK; the answer then follows as a separate message
LIFETIME = 247.0  # seconds in which a message may be repeated (EXCHANGE_LIFETIME)
REMEMBERED = 64  # messages of a client to remember, with their answers
LARGEST_SIZE = 6  # of a block: 2 ** (6 + 4) bytes
MOST_BYTES = 1_000_000  # in a resource
MOST_RESOURCES = 1_000
MOST_REQUESTS = 32  # of a client at a time, observations included
MOST_UPLOADS = 4  # of a client at a time

Path = tuple[str, ...]


@attrs.define
class Resource:
    content: bytes
    version: int = 0
    changed: trio.Event = attrs.field(factory=trio.Event)


@attrs.define
class Store:
    """The resources, for all clients."""

    resources: dict[Path, Resource] = attrs.field(factory=dict)
    slow: float = 2.0
    versions: "count[int]" = attrs.field(factory=partial(count, 1))

    def put(self, path: Path, content: bytes) -> Code:
        before = self.resources.get(path)
        if before is None and len(self.resources) >= MOST_RESOURCES:
            return REQUEST_ENTITY_TOO_LARGE
        self.resources[path] = Resource(content, next(self.versions))
        if before is not None:
            before.changed.set()
        return CREATED if before is None else CHANGED

    def delete(self, path: Path) -> Code:
        before = self.resources.pop(path, None)
        if before is not None:
            before.changed.set()
        return DELETED

    async def handler(self, client: trio_udp.Client) -> None:
        """Serve one client."""
        client.idle_timeout = LIFETIME
        async with trio.open_nursery() as nursery:
            conversation = Conversation(self, client, nursery)
            async for payload in client:
                await conversation.take(payload)
            nursery.cancel_scope.cancel()


@attrs.define
class Conversation:
    """The state of one client.

    Attributes:
      answers: The answers to the client's last requests, by message ID; ``None`` while there is no answer.
      unacknowledged: Our own messages that the client has not acknowledged, by message ID.
      rejected: The message IDs that the client has rejected with an RST.
      uploads: The parts that have arrived of resources that the client writes block by block.
      observations: The cancel scopes of observations, by token.
    """

    store: Store
    client: trio_udp.Client
    nursery: trio.Nursery
    answers: OrderedDict[int, bytes | None] = attrs.field(factory=OrderedDict)
    unacknowledged: dict[int, trio.Event] = attrs.field(factory=dict)
    rejected: set[int] = attrs.field(factory=set)
    uploads: OrderedDict[Path, bytearray] = attrs.field(factory=OrderedDict)
    observations: dict[bytes, trio.CancelScope] = attrs.field(factory=dict)
    running: int = 0
    ids: "count[int]" = attrs.field(factory=lambda: count(random.getrandbits(16)))

    async def take(self, payload: bytes) -> None:
        """Handle one message. Ignore a malformed one: answering it could go on for ever."""
        try:
            message = Message.decode(payload)
        except (Error, ValueError, IndexError):
            return
        if message.mtype in (ACK, RST):
            if (event := self.unacknowledged.pop(message.mid, None)) is not None:
                if message.mtype == RST:
                    self.rejected.add(message.mid)
                event.set()
        elif message.mid in self.answers:  # a repeated request
            if (answer := self.answers[message.mid]) is not None and message.mtype == CON:
                await self.client.send(answer)
        elif message.code.is_request() and message.mtype in (CON, NON):
            self.answers[message.mid] = None
            while len(self.answers) > REMEMBERED:
                self.answers.popitem(last=False)
            if self.running >= MOST_REQUESTS:
                await self.reply(message, Message(code=SERVICE_UNAVAILABLE), acknowledged=False)
            else:
                self.running += 1
                self.nursery.start_soon(self.answer, message)
        elif message.mtype == CON:  # a ping, or an answer to nothing
            await self.client.send(Message(_mtype=RST, _mid=message.mid, code=EMPTY).encode())

    async def answer(self, request: Message) -> None:
        """Answer a request, in the ACK if the answer is ready soon. Then go on with the observation, if it is one."""
        acknowledged = False

        async def acknowledge() -> None:
            nonlocal acknowledged
            await trio.sleep(ACK_AFTER)
            acknowledged = True
            self.answers[request.mid] = Message(_mtype=ACK, _mid=request.mid, code=EMPTY).encode()
            await self.client.send(self.answers[request.mid] or b"")

        try:
            with self.client.transaction():  # the client can acknowledge this even while the server stops
                async with trio.open_nursery() as nursery:
                    if request.mtype == CON:
                        nursery.start_soon(acknowledge)
                    response = await self.respond(request)
                    nursery.cancel_scope.cancel()
                arrived = await self.reply(request, response, acknowledged=acknowledged)
            if arrived and response.opt.observe is not None:
                await self.observe(request, response.opt.observe)
        finally:
            self.running -= 1

    async def respond(self, request: Message) -> Message:
        """Return the response to a request."""
        path: Path = request.opt.uri_path
        if any(o.number.is_critical() and int(o.number) not in UNDERSTOOD for o in request.opt.option_list()):
            return Message(code=BAD_OPTION)
        if path == ("slow",):
            await trio.sleep(self.store.slow)
            return Message(code=CONTENT, payload=b"at last")
        if request.code == GET:
            if path == (".well-known", "core"):
                links = ",".join(f"</{'/'.join(each)}>;obs" for each in self.store.resources)
                return blockwise(request, links.encode(), version=0)
            resource = self.store.resources.get(path)
            if resource is None:
                return Message(code=NOT_FOUND)
            response = blockwise(request, resource.content, resource.version)
            if request.opt.observe is not None:  # 0 starts or restarts, 1 ends
                if (scope := self.observations.pop(request.token, None)) is not None:
                    scope.cancel()
                if request.opt.observe == 0:
                    response.opt.observe = resource.version % 2**24
            return response
        if request.code == PUT:
            return self.put(request, path)
        if request.code == DELETE:
            return Message(code=self.store.delete(path))
        return Message(code=METHOD_NOT_ALLOWED)

    def put(self, request: Message, path: Path) -> Message:
        """Store a resource, or a block of one."""
        block = request.opt.block1
        if block is None:
            return Message(code=self.store.put(path, request.payload))
        if block.block_number == 0:
            self.uploads[path] = bytearray()
            while len(self.uploads) > MOST_UPLOADS:
                self.uploads.popitem(last=False)
        so_far = self.uploads.get(path)
        if so_far is None or block.start != len(so_far):
            return Message(code=REQUEST_ENTITY_INCOMPLETE)
        so_far += request.payload
        if len(so_far) > MOST_BYTES:
            del self.uploads[path]
            return Message(code=REQUEST_ENTITY_TOO_LARGE)
        code = CONTINUE if block.more else self.store.put(path, bytes(self.uploads.pop(path)))
        return Message(code=code, block1=block)

    async def observe(self, request: Message, told: int) -> None:
        """Send each change to the client, or the latest of several, until the client is gone or cancels."""
        with trio.CancelScope() as scope:
            self.observations[request.token] = scope
            self.client.idle_timeout = math.inf  # it may take long until there is a change
            while (resource := self.store.resources.get(request.opt.uri_path)) is not None:
                if resource.version % 2**24 == told:
                    await resource.changed.wait()
                    continue
                told = resource.version % 2**24
                response = blockwise(request, resource.content, resource.version)
                response.opt.observe = told
                if not await self.reply(request, response, acknowledged=True):
                    break
            else:
                await self.reply(request, Message(code=NOT_FOUND), acknowledged=True)
        if self.observations.get(request.token) is scope:
            del self.observations[request.token]
        if not self.observations:
            self.client.idle_timeout = LIFETIME

    async def reply(self, request: Message, response: Message, *, acknowledged: bool) -> bool:
        """Send a response in the ACK of the request. If that ACK has left, send it until the client acknowledges it.

        Returns:
          Whether the response may have arrived.
        """
        response.token = request.token
        if not acknowledged:
            is_confirmable = request.mtype == CON
            response.mtype = ACK if is_confirmable else NON
            response.mid = request.mid if is_confirmable else next(self.ids) % 65_536
            self.answers[request.mid] = response.encode()
            await self.client.send(response.encode())
            return True
        response.mtype, response.mid = CON, next(self.ids) % 65_536
        event = self.unacknowledged[response.mid] = trio.Event()
        try:
            for wait in trio_udp.backoff(2.5, attempts=5, jitter=0.2):  # RFC 7252, 4.8: 2 to 3 seconds, then twice that
                await self.client.send(response.encode())
                with trio.move_on_after(wait):
                    await event.wait()
                    return response.mid not in self.rejected
            return False
        finally:
            self.unacknowledged.pop(response.mid, None)
            self.rejected.discard(response.mid)


def blockwise(request: Message, content: bytes, version: int) -> Message:
    """Return the block of a content that a client requests, or the first block."""
    asked = request.opt.block2
    size = min(asked.size_exponent, LARGEST_SIZE) if asked else LARGEST_SIZE
    start = asked.start if asked else 0
    part = content[start : start + 2 ** (size + 4)]
    if asked and start and not part:
        return Message(code=BAD_OPTION)
    response = Message(code=CONTENT, payload=part, etag=version.to_bytes(4, "big"))
    if asked or len(part) < len(content):
        response.opt.block2 = (start // 2 ** (size + 4), start + len(part) < len(content), size)
    return response


async def main(host: str | None, port: int, slow: float, certificate: str | None, key: str | None) -> None:
    plain = Store(slow=slow).handler
    handler: trio_udp.Handler = plain
    if certificate is not None and key is not None:
        from OpenSSL import SSL

        context = SSL.Context(SSL.DTLS_METHOD)
        context.use_certificate_chain_file(certificate)
        context.use_privatekey_file(key)
        handler = trio_udp.dtls.secure(plain, context)
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(
                trio_udp.serve,
                handler,
                port,
                host=host,
                limits=trio_udp.Limits(max_clients=2_000, clients_per_host=200),
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=5683)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--slow", type=float, default=2.0, metavar="SECONDS", help="until /slow answers")
    parser.add_argument("--cert", metavar="FILE", help="for DTLS: the server's certificate chain")
    parser.add_argument("--key", metavar="FILE", help="for DTLS: the certificate's private key")
    arguments = parser.parse_args()
    if (arguments.cert is None) != (arguments.key is None):
        parser.error("--cert and --key go together")
    trio.run(main, arguments.host, arguments.port, arguments.slow, arguments.cert, arguments.key)
