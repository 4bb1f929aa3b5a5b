"""A STUN server (RFC 8489) that also tells clients how their NAT behaves (RFC 5780).

It answers a Binding request with the source address of the request. For RFC 5780 it needs a second address of this
machine, and listens at two ports of each address. A client may request an answer from the other address, the other
port, or both, and so learns whether its NAT lets that answer in. One ``datagram_handler`` serves all four endpoints,
and ``Server.send_to_nowait`` sends from any of them.

    python examples/stun_server.py --host 127.0.0.1 --other-host 127.0.0.2 3478
    turnutils_stunclient -f 127.0.0.1

Answers are up to 6 times as long as requests, and addresses can be forged. So a rate limit bounds the answers to each
network.
"""

import argparse
import signal
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from struct import pack, unpack_from

import trio

import trio_udp

REQUEST, SUCCESS, ERROR = 0x0001, 0x0101, 0x0111  # message types of the only method, Binding
COOKIE = bytes.fromhex("2112A442")
MAPPED_ADDRESS, CHANGE_REQUEST, ERROR_CODE, UNKNOWN_ATTRIBUTES = 0x0001, 0x0003, 0x0009, 0x000A
XOR_MAPPED_ADDRESS, PADDING, RESPONSE_PORT, RESPONSE_ORIGIN, OTHER_ADDRESS = 0x0020, 0x0026, 0x0027, 0x802B, 0x802C
CREDENTIALS = {0x0006, 0x0008, 0x0014, 0x0015, 0x001C, 0x001D, 0x001E}  # not required here, and not checked
CHANGE_HOST, CHANGE_PORT = 4, 2  # bits of CHANGE-REQUEST


def read_request(payload: bytes) -> dict[int, bytes] | None:
    """Return the attributes of a Binding request, or ``None`` if the payload is not one."""
    if len(payload) < 20 or unpack_from("!HH", payload) != (REQUEST, len(payload) - 20) or payload[4:8] != COOKIE:
        return None
    attributes: dict[int, bytes] = {}
    at = 20
    while at + 4 <= len(payload):
        kind, length = unpack_from("!HH", payload, at)
        attributes.setdefault(kind, payload[at + 4 : at + 4 + length])  # the first of several counts
        at += 4 + length + -length % 4
    sizes = {CHANGE_REQUEST: 4, RESPONSE_PORT: 4}
    well_formed = all(len(attributes.get(kind, bytes(size))) == size for kind, size in sizes.items())
    return attributes if at == len(payload) and well_formed else None


def attribute(kind: int, value: bytes) -> bytes:
    return pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)


def address(kind: int, host_and_port: tuple[str, int], mask: bytes = bytes(16)) -> bytes:
    """Encode an address as an attribute. XOR-MAPPED-ADDRESS has a mask, so that no NAT rewrites the address in it."""
    host, port = ip_address(host_and_port[0]).packed, pack("!H", host_and_port[1])
    masked = (bytes(a ^ b for a, b in zip(part, mask, strict=False)) for part in (port, host))
    return attribute(kind, pack("!H", 1 if len(host) == 4 else 2) + b"".join(masked))


def message(kind: int, transaction: bytes, attributes: bytes) -> bytes:
    return pack("!HH", kind, len(attributes)) + transaction + attributes


def handler(hosts: Mapping[str, str], ports: Mapping[int, int], datagram: trio_udp.Datagram) -> bytes | None:
    """Answer a Binding request.

    Args:
      hosts, ports: Map each of our two hosts and ports to the other one. Empty if there is only one.
    """
    requested = read_request(datagram.payload)
    if requested is None:
        return None
    transaction = datagram.payload[4:20]
    understood = CREDENTIALS | ({CHANGE_REQUEST, RESPONSE_PORT, PADDING} if hosts else set())
    if unknown := [kind for kind in requested if kind < 0x8000 and kind not in understood]:
        error = attribute(ERROR_CODE, b"\0\0\4\x14Unknown Attribute")  # 420
        return message(ERROR, transaction, error + attribute(UNKNOWN_ATTRIBUTES, pack(f"!{len(unknown)}H", *unknown)))
    peer = datagram.peer_address
    told = address(XOR_MAPPED_ADDRESS, peer[:2], transaction) + address(MAPPED_ADDRESS, peer[:2])
    if not hosts:
        return message(SUCCESS, transaction, told)
    if RESPONSE_PORT in requested and PADDING in requested:
        return message(ERROR, transaction, attribute(ERROR_CODE, b"\0\0\4\0Bad Request"))  # 400

    local_host, local_port = datagram.local_address[:2]
    change = requested.get(CHANGE_REQUEST, bytes(4))[3]
    origin = (
        hosts[local_host] if change & CHANGE_HOST else local_host,
        ports[local_port] if change & CHANGE_PORT else local_port,
    )
    told += address(RESPONSE_ORIGIN, origin) + address(OTHER_ADDRESS, (hosts[local_host], ports[local_port]))
    if PADDING in requested:
        told += attribute(PADDING, bytes(len(requested[PADDING])))  # as many bytes as the request, not our MTU
    answer = message(SUCCESS, transaction, told)
    if not change and RESPONSE_PORT not in requested:
        return answer
    (port,) = unpack_from("!H", requested.get(RESPONSE_PORT, pack("!H", peer[1])))
    assert datagram.server is not None
    with suppress(OSError, ValueError, trio.WouldBlock):  # port 0, no route or a full send buffer: no answer
        datagram.server.send_to_nowait(answer, (peer[0], port, *peer[2:]), local_address=origin)
    return None


async def open_all(host: str | None, other_host: str | None, port: int, other_port: int) -> list[trio_udp.Endpoint]:
    """Open one endpoint, or with a second host two for each host."""
    endpoints = await trio_udp.open_endpoints(port, host=host)
    if other_host is not None:
        port = endpoints[0].local_address[1]
        endpoints += await trio_udp.open_endpoints(other_port, host=host)
        other_port = endpoints[1].local_address[1]
        for each in (port, other_port):
            endpoints += await trio_udp.open_endpoints(each, host=other_host)
    return endpoints


async def main(host: str | None, other_host: str | None, port: int, other_port: int) -> None:
    endpoints = await open_all(host, other_host, port, other_port)
    hosts: dict[str, str] = {}
    ports: dict[int, int] = {}
    if other_host is not None:
        (one, port, *_), (other, other_port, *_) = endpoints[0].local_address, endpoints[-1].local_address
        hosts, ports = {one: other, other: one}, {port: other_port, other_port: port}
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                trio_udp.serve_endpoints,
                trio_udp.datagram_handler(partial(handler, hosts, ports)),
                endpoints,
                limits=trio_udp.Limits(rate_limit=trio_udp.RateLimit(100)),
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=3478)
    parser.add_argument("--host", help="address to bind; all interfaces by default")
    parser.add_argument("--other-host", metavar="HOST", help="another address of this machine, for RFC 5780")
    parser.add_argument("--other-port", type=int, default=3479, metavar="PORT", help="for RFC 5780")
    arguments = parser.parse_args()
    if arguments.other_host is not None and arguments.host is None:
        parser.error("--other-host needs --host")
    trio.run(main, arguments.host, arguments.other_host, arguments.port, arguments.other_port)
