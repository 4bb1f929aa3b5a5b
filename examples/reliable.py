"""Reliable requests: each is done once and answered, whatever the network loses, duplicates or reorders.

The client repeats a request until it is answered (``trio_udp.request``). So the server may see a request several times.
It keeps its last answers to each client, and sends an answer again without doing the work again.

    python examples/reliable.py 9999                    (a server that adds amounts up; or:
    trio-udp --idle-timeout 120 examples/reliable.py:handler)
    python examples/reliable.py 9999 --add 10 20 12     (in another terminal: prints each total)

The server forgets the answers together with the client, so ``idle_timeout`` must be longer than a client repeats a
request.
"""

import argparse
import secrets
import signal
from functools import partial

import trio

import trio_udp

# Answers to keep for each client. A client has one request at a time, so no duplicate datagram is older than these.
KEPT = 32
IDLE_TIMEOUT = 120.0
WAITS = trio_udp.backoff(0.5, attempts=10, most=8)  # 0.5, 1, 2, 4, 8, 8, ...: about a minute


class Account:
    """Work that must not be done twice."""

    def __init__(self) -> None:
        self.total = 0
        self.additions = 0

    async def add(self, amount: int) -> int:
        self.additions += 1
        await trio.sleep(0.01)  # a database, for example
        self.total += amount
        return self.total

    async def handler(self, client: trio_udp.Client) -> None:
        """Answer ``b"ID AMOUNT"`` with ``b"ID TOTAL"``."""
        answers: dict[bytes, bytes] = {}
        async for payload in client:  # one at a time: a repeated request waits, and then gets the same answer
            request_id, _, amount = payload.strip().partition(b" ")
            if request_id not in answers:
                try:
                    answers[request_id] = b"%d" % await self.add(int(amount))
                except ValueError:
                    continue  # not a request
                if len(answers) > KEPT:
                    del answers[next(iter(answers))]
            await client.send(b"%b %b" % (request_id, answers[request_id]))


handler = Account().handler


async def add(channel: trio.abc.Channel[bytes], amount: int) -> int:
    """Add an amount, once, and return the total."""
    request_id = secrets.token_hex(8).encode()  # random, so no earlier request has it and no stranger knows it
    answer = await trio_udp.request(
        channel, b"%b %d" % (request_id, amount), lambda payload: payload.split(b" ")[0] == request_id, waits=WAITS
    )
    return int(answer.split()[1])


async def client(host: str, port: int, amounts: list[int]) -> None:
    async with await trio_udp.connect(host, port) as connection:
        for amount in amounts:
            try:
                print(await add(connection, amount), flush=True)
            except trio_udp.NoAnswerError as error:
                raise SystemExit(f"{amount}: {error}") from None


async def server(host: str | None, port: int) -> None:
    account = Account()
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(
                trio_udp.serve,
                account.handler,
                port,
                host=host,
                max_datagram_size=100,
                idle_timeout=IDLE_TIMEOUT,
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
    print(f"{account.additions} additions for {server.statistics().received} requests", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="address of the server; all interfaces by default, with --add 127.0.0.1")
    parser.add_argument("--add", type=int, nargs="+", metavar="AMOUNT", help="run a client, and add these amounts")
    arguments = parser.parse_args()
    if arguments.add:
        trio.run(client, arguments.host or "127.0.0.1", arguments.port, arguments.add)
    else:
        trio.run(server, arguments.host, arguments.port)
