"""Find programs on the network, without knowing any address: ask a group, and hear the answer of each member.

    python examples/discovery.py serve kitchen          (on several machines, or several times on one)
    python examples/discovery.py ask                    (prints the name and the address of each)

A server answers on the interface that the question came in on. The client is an endpoint without a server, which hears
all answers. It asks three times, since UDP promises no delivery, and shows each name once.
"""

import argparse
import signal
import socket
import sys
from collections.abc import Iterator

import trio

import trio_udp

# Groups for use within an organization (RFC 2365), and on one link (RFC 4291).
GROUPS = {4: "239.192.77.77", 6: "ff02::7777"}
QUESTION = b"who is there?"


def share(sock: socket.socket) -> None:
    """Let several servers on this machine have the port. Each of them hears the group."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def interfaces(chosen: list[str] | None) -> Iterator[str]:
    """Yield the interfaces that the user has chosen, or all."""
    yield from chosen or (name for _, name in socket.if_nameindex())


async def serve(name: str, port: int, version: int, chosen: list[str] | None) -> str | None:
    """Answer until a signal; return what went wrong, if anything did."""
    (endpoint,) = await trio_udp.open_endpoints(port, host="::" if version == 6 else "0.0.0.0", configure=share)
    joined = []
    for interface in interfaces(chosen):
        try:
            endpoint.join_group(GROUPS[version], interface=interface)
        except OSError as error:  # it is down, for example, or does not have this version of IP
            print(error, file=sys.stderr)
        else:
            joined.append(interface)
    if not joined:
        endpoint.close()
        return "no interface to listen on"

    @trio_udp.datagram_handler
    def answer(datagram: trio_udp.Datagram) -> bytes | None:
        return name.encode() if datagram.payload == QUESTION else None

    print(f"listening on {', '.join(joined)}:{port}", flush=True)
    await trio_udp.serve_endpoints(answer, [endpoint], stop_signals={signal.SIGINT, signal.SIGTERM})
    return None


async def send_questions(endpoint: trio_udp.Endpoint, port: int, version: int, chosen: list[str] | None) -> None:
    for _ in range(3):
        for interface in interfaces(chosen):
            try:
                endpoint.multicast_interface = interface
                await endpoint.send_to(QUESTION, (GROUPS[version], port))
            except OSError as error:
                print(f"{interface}: {error}", file=sys.stderr)
        await trio.sleep(0.2)


async def ask(seconds: float, port: int, version: int, chosen: list[str] | None) -> str | None:
    (endpoint,) = await trio_udp.open_endpoints(0, host="::" if version == 6 else "0.0.0.0")
    found = set()
    async with endpoint, trio.open_nursery() as nursery:
        nursery.start_soon(send_questions, endpoint, port, version, chosen)
        with trio.move_on_after(seconds):
            async for datagram in endpoint:
                text = datagram.payload.decode(errors="replace")
                # Anyone may answer: nothing that moves the cursor, or forges a line.
                who = "".join(filter(str.isprintable, text)), datagram.peer_address[0]
                if who not in found:
                    found.add(who)
                    print(*who, flush=True)
        nursery.cancel_scope.cancel()
    return None if found else "nobody is there"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("name", help="what to answer")
    commands.add_parser("ask").add_argument("--seconds", type=float, default=1.0, help="to wait for answers")
    for command in commands.choices.values():
        command.add_argument("--interface", action="append", help="name, index or address; all by default")
        command.add_argument("--version", type=int, choices=GROUPS, default=4, help="of IP")
        command.add_argument("--port", type=int, default=7777)
    arguments = parser.parse_args()
    where = arguments.port, arguments.version, arguments.interface
    if arguments.command == "serve":
        sys.exit(trio.run(serve, arguments.name, *where))
    sys.exit(trio.run(ask, arguments.seconds, *where))
