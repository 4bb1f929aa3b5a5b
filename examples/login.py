"""Receive several times in one handler: a login with a time limit, then a session until "quit".

A conversation that has steps is written down in steps; between them, its state is in local variables.

    python examples/login.py
    nc -u 127.0.0.1 9999        (in another terminal: anything begins; the user is "ada", the password "lovelace")
"""

import argparse
import hmac
import signal
from functools import partial

import trio

import trio_udp

PASSWORDS = {b"ada": b"lovelace"}  # for show: keep salted hashes, and send no password over plain UDP


async def ask(client: trio_udp.Client, question: bytes, seconds: float) -> bytes:
    await client.send(question)
    with trio.fail_after(seconds):
        return (await client.receive()).strip()


async def log_in(client: trio_udp.Client, seconds: float) -> bytes | None:
    """Return the name of the user, or None after three wrong passwords."""
    await client.receive()  # the datagram that began the conversation answers no question
    complaint = b""
    for _ in range(3):
        user = await ask(client, complaint + b"user name? ", seconds)
        password = await ask(client, b"password? ", seconds)
        # Compare in any case: how long it takes must not tell whether there is such a user.
        is_right = hmac.compare_digest(password, PASSWORDS.get(user, b""))
        if is_right and user in PASSWORDS:
            return user
        complaint = b"wrong\n"
    return None


async def handler(answer_time: float, idle_time: float, client: trio_udp.Client) -> None:
    try:
        with client.transaction():  # a login that has begun may end, even while the server stops
            user = await log_in(client, answer_time)
    except trio.TooSlowError:
        return await client.send(b"goodbye: that took too long\n")
    if user is None:
        return await client.send(b"goodbye: wrong three times\n")
    client.idle_timeout = idle_time
    await client.send(b"welcome, %b\n" % user)
    async for payload in client:
        if payload.strip() == b"quit":
            return await client.send(b"goodbye\n")
        await client.send(b"%b: %b" % (user, payload))
    await client.send(f"goodbye: {client.ended}\n".encode())  # "idle" or "stopping"


async def main(host: str | None, port: int, answer_time: float, idle_time: float) -> None:
    session = partial(handler, answer_time, idle_time)
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            # Long enough for a login: a user name and a password.
            partial(trio_udp.serve, session, port, host=host, drain_timeout=2 * answer_time, stop_signals=stop_signals)
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--answer-time", type=float, default=20.0, metavar="SECONDS", help="for each question")
    parser.add_argument("--idle-time", type=float, default=600.0, metavar="SECONDS", help="after the login")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.answer_time, arguments.idle_time)
