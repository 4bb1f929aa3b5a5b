"""Find programs on the network without knowing an address: ask a group, and receive an answer from each member.

    python examples/discovery.py serve kitchen          (on several machines, or several times on one)
    python examples/discovery.py ask                    (prints the name and the address of each server)

A server answers on the interface on which the question arrived. The client is an endpoint without a server, which
receives all answers. UDP promises no delivery, so it asks three times, and prints each name once.
"""

import argparse
import signal
import socket
import sys
from collections.abc import Iterator

import trio

import trio_udp

# A group for use within an organization (RFC 2365), and one for use on a link (RFC 4291).
GROUPS = {4: "239.192.77.77", 6: "ff02::7777"}
QUESTION = b"who is there?"


def share(sock: socket.socket) -> None:
    """Share the port with other servers on this machine. Each of them receives what is sent to the group."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def interfaces(chosen: list[str] | None) -> Iterator[str]:
    """Yield the interfaces that the user has chosen, or all interfaces."""
    yield from chosen or (name for _, name in socket.if_nameindex())


async def serve(name: str, port: int, version: int, chosen: list[str] | None) -> str | None:
    """Answer until a signal. Return an error message, or None."""
    (endpoint,) = await trio_udp.open_endpoints(port, host="::" if version == 6 else "0.0.0.0", configure=share)
    joined = []
    for interface in interfaces(chosen):
        try:
            endpoint.join_group(GROUPS[version], interface=interface)
        except OSError as error:  # for example, the interface is down or does not have this version of IP
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
                # Anyone may answer: remove characters that would move the cursor or forge a line.
                who = "".join(filter(str.isprintable, text)), datagram.peer_address[0]
                if who not in found:
                    found.add(who)
                    print(*who, flush=True)
        nursery.cancel_scope.cancel()
    return None if found else "no answer"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("name", help="the answer")
    commands.add_parser("ask").add_argument("--seconds", type=float, default=1.0, help="time to wait for answers")
    for command in commands.choices.values():
        command.add_argument("--interface", action="append", help="name, index or address; all by default")
        command.add_argument("--version", type=int, choices=GROUPS, default=4, help="version of IP")
        command.add_argument("--port", type=int, default=7777)
    arguments = parser.parse_args()
    where = arguments.port, arguments.version, arguments.interface
    if arguments.command == "serve":
        sys.exit(trio.run(serve, arguments.name, *where))
    sys.exit(trio.run(ask, arguments.seconds, *where))
