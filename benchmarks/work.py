"""Handlers for the measurements of workers, which run ``trio-udp --workers 2 work.py:work``."""

import hashlib

import trio_udp

ITERATIONS = 100  # about 50 µs


async def work(client: trio_udp.Client) -> None:
    """Answer each datagram after some work."""
    async for payload in client:
        hashlib.pbkdf2_hmac("sha256", payload, b"salt", ITERATIONS)
        await client.send(payload)


async def echo(client: trio_udp.Client) -> None:
    async for payload in client:
        await client.send(payload)
