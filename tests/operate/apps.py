"""Handlers for tests with worker processes, which import them from this module, and helpers for their clients."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import trio_udp

PID = str(os.getpid()).encode()


async def tell_pid(client: trio_udp.Client) -> None:
    """Answer each payload with the payload and the pid of the worker."""
    async for payload in client:
        await client.send(PID + b" " + payload)


@trio_udp.datagram_handler
def tell_pid_of_datagram(datagram: trio_udp.Datagram) -> bytes:
    return PID + b" " + datagram.payload


async def ignore_the_drain(client: trio_udp.Client) -> None:
    async for _ in client:
        await client.send(PID)
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()


async def block(client: trio_udp.Client) -> None:
    async for _ in client:
        client.send_nowait(PID)
        await trio.sleep(0.01)  # so that it leaves
        time.sleep(600)  # noqa: ASYNC251  # as a mistake would


async def fail(client: trio_udp.Client) -> None:
    await client.receive()
    raise ValueError("always")


async def end_the_process(client: trio_udp.Client) -> None:
    await client.send(PID)
    os._exit(5)


async def answer_in_two_steps(client: trio_udp.Client) -> None:
    await client.receive()
    with client.transaction():
        await client.send(b"go on")
        await client.send(b"done: " + await client.receive())


@asynccontextmanager
async def with_a_file() -> AsyncIterator[trio_udp.Handler]:
    """A resource: the file ``open.PID`` exists while a worker has it."""
    name = f"open.{os.getpid()}"
    await trio.Path(name).touch()
    yield tell_pid
    await trio.Path(name).unlink()


@asynccontextmanager
async def gives_a_number() -> AsyncIterator[int]:
    yield 5


greeted = 0


def accept_greetings(datagram: trio_udp.Datagram) -> bool | bytes:
    global greeted
    greeted += 1
    return datagram.payload == b"hello" or b"?"


async def tell_greetings(client: trio_udp.Client) -> None:
    """Answer with the number of times that ``accept_greetings`` was called, in the same module."""
    async for _ in client:
        await client.send(b"%d" % greeted)


# Mistakes.

number = 5


def plain(client: trio_udp.Client) -> None:
    pass


async def generator(client: trio_udp.Client) -> AsyncIterator[int]:
    yield 1


async def no_argument() -> None:
    pass


async def two_arguments(client: trio_udp.Client, other: int) -> None:
    pass


def gives_nothing() -> None:
    pass


class Class:
    async def handler(self, client: trio_udp.Client) -> None:
        async for payload in client:
            await client.send(payload)


instance = Class()

if os.environ.get("TRIO_UDP_TEST_EXIT"):
    sys.exit(3)
