"""The SNTP server: with chronyd, and byte by byte."""

from __future__ import annotations

import getpass
import os
import re
import socket
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import trio

import trio_udp

from ..conftest import StartServer, check_adds_up, plain_socket, port_of
from ..project.conftest import Start, ask, waiting, without_signals
from .conftest import load, program

sntp_server = load("sntp_server")

STAMP = bytes(range(100, 108))
REQUEST = bytes([4 << 3 | 3, 0, 6]) + bytes(37) + STAMP


def read_stamp(answer: bytes, at: int) -> int:
    """Return a time stamp in nanoseconds since 1970."""
    since_1900 = int.from_bytes(answer[at : at + 8], "big")
    return (since_1900 * 10**9 >> 32) - 2_208_988_800 * 10**9


@without_signals
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_chronyd(start: Start, tmp_path: Path, host: str) -> None:
    """chronyd gets the time from the server, and finds its own clock right, because both use the same clock."""
    chronyd = program("chronyd", "chrony")
    example = start("sntp_server", "--host", host)
    command = [chronyd, "-Q", "-t", "10", "-u", "root" if os.geteuid() == 0 else getpass.getuser()]
    server = f"server {host} port {example.port} iburst maxsamples 1"
    done = subprocess.run([*command, server, f"pidfile {tmp_path}/pid"], capture_output=True, text=True, timeout=15)
    wrong_by = re.search(r"System clock wrong by (-?[\d.]+) seconds", done.stdout + done.stderr)
    assert wrong_by, done
    assert abs(float(wrong_by[1])) < 0.1


@without_signals
def test_answer(start: Start) -> None:
    """The answer has the version and poll of the request, repeats its time stamp, and names a local clock."""
    example = start("sntp_server", "--host", "127.0.0.1", "--stratum", "5")
    peer = example.peer()
    before = time.time_ns()
    answer = ask(peer, REQUEST)
    after = time.time_ns()
    assert len(answer) == 48
    assert answer[:12] == bytes([4 << 3 | 4, 5, 6, 0x100 - 20]) + bytes(4) + bytes([0, 0, 2, 143])
    assert answer[12:16] == bytes([127, 127, 1, 1])
    assert answer[24:32] == STAMP
    reference, received, sent = (read_stamp(answer, at) for at in (16, 32, 40))
    assert before - 1 <= reference == received <= sent <= after
    assert ask(peer, bytes([3 << 3 | 3]) + REQUEST[1:] + bytes(20))[0] == 3 << 3 | 4  # an older version, authenticated


@without_signals
def test_only_requests_are_answered(start: Start) -> None:
    """A payload that is not a request gets no answer, least of all another server's answer."""
    example = start("sntp_server", "--host", "127.0.0.1")
    peer = example.peer()
    answer = ask(peer, REQUEST)
    for payload in (
        b"",
        b"x",
        REQUEST[:47],
        answer,
        *(bytes([4 << 3 | mode]) + REQUEST[1:] for mode in (0, 1, 2, 6, 7)),
    ):
        peer.send(payload)
    assert ask(peer, REQUEST)[24:32] == STAMP
    assert waiting(peer) == []


def is_stamped_on_arrival(sock: socket.socket) -> bool:
    """Whether the time stamp of a datagram that the socket sends to itself is from before it was read."""
    sock.sendto(b"", sock.getsockname())
    before_it_is_read = time.time_ns()
    ((_, _, stamp),) = sock.recvmsg(1, 100)[1]
    seconds, nanoseconds = struct.unpack("ll", stamp)
    return bool(seconds * 10**9 + nanoseconds <= before_it_is_read)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
async def test_time_stamps_of_the_kernel(start_on_loopback: StartServer) -> None:
    """The time of arrival is the kernel's time stamp, from before the program ran."""
    handler = trio_udp.datagram_handler(partial(sntp_server.tell_time, 1))
    server = await start_on_loopback(handler, configure=sntp_server.ask_for_time_stamps)
    with plain_socket() as sock, plain_socket() as other:
        # Linux begins to stamp all datagrams a moment after a first socket has asked; until then it stamps those that
        # are read. It does not tell when, so try with a socket that also asks. On a busy machine the moment is long.
        sntp_server.ask_for_time_stamps(other)
        with trio.fail_after(5):
            while not is_stamped_on_arrival(other):
                await trio.lowlevel.checkpoint()
        before = time.time_ns()
        sock.sendto(REQUEST, ("127.0.0.1", port_of(server)))
        after = time.time_ns()  # the server is in this thread, and has not run yet
        answer = await trio.to_thread.run_sync(sock.recv, 100)
    assert before - 1 <= read_stamp(answer, 32) <= after <= read_stamp(answer, 40) + 1
    check_adds_up(server)


def test_time_after_2036() -> None:
    """Time stamps start again at 0 on 7 February 2036, as RFC 4330 says."""
    era = 2_085_978_496 * 10**9
    assert [sntp_server.to_ntp(era + seconds * 10**9) >> 32 for seconds in (-1, 0, 1)] == [2**32 - 1, 0, 1]
    assert sntp_server.to_ntp(500_000_000) == 2_208_988_800 << 32 | 2**31
