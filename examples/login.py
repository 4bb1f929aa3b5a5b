"""Receive several times in one handler: a login with a time limit, then a session until "quit".

A conversation with steps is a function with steps. Its state is in local variables.

    python examples/login.py    (or: trio-udp --drain 40 examples/login.py:handler)
    nc -u 127.0.0.1 9999        (in another terminal: any line starts; the user is "ada", the password "lovelace")
"""

import hmac
import logging
import os
import signal
import sys
from functools import partial

import trio

import trio_udp

# The time to answer each question, and the longest silence after the login, in seconds.
ANSWER_TIME = float(os.environ.get("ANSWER_TIME", "20"))
IDLE_TIME = float(os.environ.get("IDLE_TIME", "600"))

PASSWORDS = {b"ada": b"lovelace"}  # only for this example: store salted hashes, and send no password over plain UDP


async def ask(client: trio_udp.Client, question: bytes) -> bytes:
    await client.send(question)
    with trio.fail_after(ANSWER_TIME):
        return (await client.receive()).strip()


async def log_in(client: trio_udp.Client) -> bytes | None:
    """Return the name of the user, or None after three wrong passwords."""
    await client.receive()  # the first datagram starts the conversation and answers no question
    complaint = b""
    for _ in range(3):
        user = await ask(client, complaint + b"user name? ")
        password = await ask(client, b"password? ")
        # Always compare, so that the time it takes does not tell whether the user exists.
        is_right = hmac.compare_digest(password, PASSWORDS.get(user, b""))
        if is_right and user in PASSWORDS:
            return user
        complaint = b"wrong\n"
    return None


async def handler(client: trio_udp.Client) -> None:
    try:
        with client.transaction():  # a stopping server lets a login finish
            user = await log_in(client)
    except trio.TooSlowError:
        return await client.send(b"goodbye: that took too long\n")
    if user is None:
        return await client.send(b"goodbye: wrong three times\n")
    client.idle_timeout = IDLE_TIME
    await client.send(b"welcome, %b\n" % user)
    async for payload in client:
        if payload.strip() == b"quit":
            return await client.send(b"goodbye\n")
        await client.send(b"%b: %b" % (user, payload))
    await client.send(f"goodbye: {client.ended}\n".encode())  # "idle" or "stopping"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    port = int(sys.argv[1]) if sys.argv[1:] else 9999
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    # The drain is long enough for one user name and one password.
    trio.run(partial(trio_udp.serve, handler, port, drain_timeout=2 * ANSWER_TIME, stop_signals=stop_signals))
