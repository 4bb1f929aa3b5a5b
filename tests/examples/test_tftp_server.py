"""The TFTP server: curl, tftp-hpa and atftp read and write, also with 10 % loss; no path leads out of the root."""

from __future__ import annotations

import io
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from signal import SIGTERM
from struct import pack

import attrs
import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import MockClock

from trio_udp.testing import SimulatedNetwork, deterministic_scheduling

from ..namespaces import inside, machines, needs_namespaces, run
from ..project.conftest import TIMEOUT, Example, Start, without_signals
from .conftest import load, program

tftp = load("tftp_server")

LONG = random.Random(1).randbytes(1_000_003)
TEXT = b"one\ntwo\r\n\rthree\r"


@attrs.define
class Served:
    """A server for a directory with LONG and TEXT, and a directory to work in."""

    example: Example
    root: Path
    work: Path

    def path(self, name: str, content: bytes | None = None) -> Path:
        path = self.work / name
        if content is not None:
            path.write_bytes(content)
        return path


@pytest.fixture
def serve(start: Start, tmp_path: Path) -> Callable[..., Served]:
    def serve(*options: str) -> Served:
        root, work = tmp_path / "root", tmp_path / "work"
        root.mkdir()
        work.mkdir()
        (root / "long").write_bytes(LONG)
        (root / "text").write_bytes(TEXT)
        return Served(start("tftp_server", *options, "--host", "127.0.0.1", "--root", str(root)), root, work)

    return serve


Serve = Callable[..., Served]


def transfer(*command: str, cwd: Path) -> str:
    """Run a client; return its output if it succeeds, and fail the test otherwise."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=cwd)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def curl_read(port: int, name: str, local: str, *options: str) -> list[str]:
    return [program("curl", "curl"), "-sS", *options, f"tftp://127.0.0.1:{port}/{name}", "-o", local]


def curl_write(port: int, name: str, local: str, *options: str) -> list[str]:
    return [program("curl", "curl"), "-sS", *options, "-T", local, f"tftp://127.0.0.1:{port}/{name}"]


def hpa(port: int, *words: str, mode: str = "octet") -> list[str]:
    return [program("tftp", "tftp-hpa"), "-m", mode, "127.0.0.1", str(port), "-c", *words]


def atftp(port: int, direction: str, name: str, local: str, **options: int) -> list[str]:
    chosen = [word for option in options.items() for word in ("--option", "{} {}".format(*option))]
    return [program("atftp", "atftp"), *chosen, direction, "-r", name, "-l", local, "127.0.0.1", str(port)]


Command = Callable[..., list[str]]

READERS: dict[str, Command] = {
    "curl": curl_read,
    "curl, long blocks": lambda *where: curl_read(*where, "--tftp-blksize", "65464"),
    "curl, no options": lambda *where: curl_read(*where, "--tftp-no-options"),
    "tftp-hpa": lambda port, name, local: hpa(port, "get", name, local),
    "atftp": lambda port, name, local: atftp(port, "-g", name, local, blksize=1428),
    "atftp, windows": lambda port, name, local: atftp(port, "-g", name, local, blksize=1428, windowsize=16),
}
WRITERS: dict[str, Command] = {
    "curl": curl_write,
    "curl, long blocks": lambda *where: curl_write(*where, "--tftp-blksize", "65464"),
    "curl, no options": lambda *where: curl_write(*where, "--tftp-no-options"),
    "tftp-hpa": lambda port, name, local: hpa(port, "put", local, name),
    "atftp": lambda port, name, local: atftp(port, "-p", name, local, blksize=1428),
    "atftp, windows": lambda port, name, local: atftp(port, "-p", name, local, blksize=1428, windowsize=16),
}


@without_signals
def test_reading(serve: Serve) -> None:
    """All clients get a file byte for byte, with and without options; also an empty one, and one of whole blocks."""
    served = serve()
    (served.root / "empty").touch()
    (served.root / "whole").write_bytes(LONG[:1024])
    for client, command in READERS.items():
        for name in ("long", "whole") if "curl" in client else ("long", "whole", "empty"):  # curl 7.88 fails at "empty"
            transfer(*command(served.example.port, name, "copy"), cwd=served.work)
            assert (served.work / "copy").read_bytes() == (served.root / name).read_bytes(), (client, name)
            (served.work / "copy").unlink()


@without_signals
def test_writing(serve: Serve) -> None:
    """All clients write a file byte for byte, with and without options; it exists when the client has finished."""
    served = serve("--write")
    for size in (0, 1024, len(LONG)):
        served.path("original", LONG[:size])
        for number, (client, command) in enumerate(WRITERS.items()):
            name = f"copy{number}-{size}"
            transfer(*command(served.example.port, name, "original"), cwd=served.work)
            assert (served.root / name).read_bytes() == LONG[:size], client
    assert len(list(served.root.iterdir())) == 2 + 3 * len(WRITERS)
    assert len(served.example.stop()) == 3 * len(WRITERS)  # without waiting for clients that might ask again


@without_signals
def test_text(serve: Serve) -> None:
    """In netascii a text arrives unchanged, although it has other line ends on the network."""
    served = serve("--write")
    served.path("original", TEXT)
    transfer(*hpa(served.example.port, "put", "original", "copy", mode="ascii"), cwd=served.work)
    assert (served.root / "copy").read_bytes() == TEXT
    transfer(*hpa(served.example.port, "get", "text", "copy", mode="ascii"), cwd=served.work)
    assert (served.work / "copy").read_bytes() == TEXT
    peer = served.example.peer()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.sendto(b"\0\1text\0NetASCII\0", peer.getpeername())
        assert sock.recv(600) == b"\0\3\0\1one\r\ntwo\r\0\r\n\r\0three\r\0"


class Raw:
    """A client that sends raw packets."""

    def __init__(self, served: Served) -> None:
        self.server = ("127.0.0.1", served.example.port)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.settimeout(TIMEOUT)
        self.there = self.server

    def ask(self, payload: bytes) -> bytes:
        """Send a request to the server, or the next packet to its port for this transfer; return the answer."""
        self.sock.sendto(payload, self.server if payload[1] in (1, 2) else self.there)
        answer, self.there = self.sock.recvfrom(70_000)
        return answer

    def close(self) -> None:
        self.sock.close()


@without_signals
@pytest.mark.parametrize(
    ("asked", "agreed"),
    [
        (b"blksize\x001000\0TSize\x000\0", b"blksize\x001000\0tsize\x001000003\0"),
        (b"WindowSize\x0065535\0blksize\x008192\0", b"blksize\x008192\0windowsize\x00128\0"),
        (b"timeout\x003\0multicast\0\0blksize\x007\0windowsize\x000\0", b"timeout\x003\0"),
    ],
)
def test_options(serve: Serve, asked: bytes, agreed: bytes) -> None:
    """The server confirms the options that it accepts, with the window size that it uses; others are left out."""
    with closing(Raw(serve())) as raw:
        assert raw.ask(b"\0\1long\0octet\0" + asked) == b"\0\6" + agreed
        assert raw.ask(b"\0\4\0\0")[:4] == b"\0\3\0\1"


@without_signals
def test_one_transfer_for_each_client(serve: Serve) -> None:
    """Each transfer has its own port, which ignores other senders; a repeated request starts no second transfer."""
    served = serve()
    with closing(Raw(served)) as one, closing(Raw(served)) as two:
        assert one.ask(b"\0\1long\0octet\0") == two.ask(b"\0\1long\0octet\0") == b"\0\3\0\1" + LONG[:512]
        assert len({one.there, two.there, one.server}) == 3
        two.sock.sendto(b"\0\4\0\1", one.there)
        one.sock.sendto(b"\0\1text\0octet\0", one.server)
        assert two.ask(b"\0\4\0\1") == b"\0\3\0\2" + LONG[512:1024]
        assert one.ask(b"\0\4\0\1") == b"\0\3\0\2" + LONG[512:1024]
        assert one.ask(b"\0\4\0\2") == b"\0\3\0\3" + LONG[1024:1536]


@without_signals
def test_refusals(serve: Serve, tmp_path: Path) -> None:
    """Paths that leave the root, by dots or by links, existing names and malformed requests are refused."""
    served = serve("--write", "--most", "1000")
    (tmp_path / "secret").write_bytes(b"secret")
    (served.root / "link").symlink_to(tmp_path / "secret")
    (served.root / "folder").symlink_to(tmp_path)
    (served.root / "inside").symlink_to("text")
    os.mkfifo(served.root / "fifo")
    codes = {}
    requests = {
        b"\0\1../secret\0octet\0": 2,
        b"\0\1/../secret\0octet\0": 2,
        b"\0\1x/../../secret\0octet\0": 2,
        os.fsencode(f"\0\1{tmp_path}/secret\0octet\0"): 1,  # a path with a leading slash starts at the root
        b"\0\1link\0octet\0": 2,
        b"\0\1folder/secret\0octet\0": 2,
        b"\0\1none\0octet\0": 1,
        b"\0\1text/more\0octet\0": 1,
        b"\0\1.\0octet\0": 2,
        b"\0\1fifo\0octet\0": 2,
        b"\0\1" + b"x" * 300 + b"\0octet\0": 2,
        b"\0\2../new\0octet\0": 2,
        b"\0\2folder/new\0octet\0": 2,
        b"\0\2none/new\0octet\0": 1,
        b"\0\2text\0octet\0": 6,
        b"\0\2link\0octet\0": 2,
        b"\0\2new\0octet\0tsize\x001001\0": 3,
        b"\0\1text\0mail\0": 4,
        b"\0\1text\0octet": 4,
        b"\0\1text\0octet\0blksize\0": 4,
        b"\0\1\0octet\0": 4,
        b"\0\1": 4,
    }
    for request in requests:
        with closing(Raw(served)) as raw:
            answer = raw.ask(request)
            codes[request] = answer[3] if answer[:2] == b"\0\5" else answer
    assert codes == requests
    with closing(Raw(served)) as raw:
        assert raw.ask(b"\0\1/inside\0octet\0") == b"\0\3\0\1" + TEXT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "secret", "work"]
    assert (tmp_path / "secret").read_bytes() == b"secret"


@without_signals
def test_for_reading_only(serve: Serve) -> None:
    """Without --write, clients cannot write."""
    served = serve()
    with closing(Raw(served)) as raw:
        assert raw.ask(b"\0\2new\0octet\0")[:4] == b"\0\5\0\2"
    assert len(list(served.root.iterdir())) == 2


@without_signals
def test_files_appear_when_they_are_complete(serve: Serve) -> None:
    """A transfer that is aborted by the client, the size or the server's end leaves nothing behind."""
    served = serve("--write", "--most", "1000")
    before = sorted(served.root.iterdir())
    data = b"\0\3\0\1" + LONG[:512]
    with closing(Raw(served)) as one, closing(Raw(served)) as two, closing(Raw(served)) as three:
        for raw in (one, two, three):
            assert raw.ask(b"\0\2new\0octet\0") == b"\0\4\0\0"
            assert raw.ask(data) == b"\0\4\0\1"
        one.sock.sendto(b"\0\5\0\0changed my mind\0", one.there)
        assert two.ask(b"\0\3\0\2" + LONG[:512]) == b"\0\5\0\3too long\0"
        assert not (served.root / "new").exists()
        answers = {b"\0\4\0\1"}
        while b"\0\4\0\1" in answers:  # it is repeated
            served.example.signal(SIGTERM)  # the second one stops the server at once
            answers = {three.sock.recv(100)}
        assert answers == {b"\0\5\0\0the server is stopping\0"}
    served.example.wait()
    assert sorted(served.root.iterdir()) == before


@without_signals
def test_the_last_answer_is_repeated(serve: Serve) -> None:
    """If the ACK of the last block is lost, it is sent again; a second upload of the name is refused."""
    served = serve("--write")
    with closing(Raw(served)) as raw:
        assert raw.ask(b"\0\2new\0octet\0") == b"\0\4\0\0"
        assert [raw.ask(b"\0\3\0\1abc") for _ in range(3)] == [b"\0\4\0\1"] * 3
        assert (served.root / "new").read_bytes() == b"abc"


@without_signals
def test_a_transfer_may_end_while_the_server_stops(serve: Serve) -> None:
    """SIGTERM lets transfers finish, and refuses new ones."""
    served = serve()
    with closing(Raw(served)) as raw:
        assert raw.ask(b"\0\1long\0octet\0blksize\x0060000\0") == b"\0\6blksize\x0060000\0"
        got = bytearray()
        served.example.signal(SIGTERM)
        for number in range(len(LONG) // 60_000 + 1):
            got += raw.ask(pack("!HH", 4, number))[4:]
        raw.sock.sendto(pack("!HH", 4, number + 1), raw.there)
    assert got == LONG
    served.example.wait()


@needs_namespaces
@without_signals
@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft")
def test_40_megabytes_through_loss(start: Start, tmp_path: Path) -> None:
    """curl reads and writes 40 MB byte for byte through a network that loses one packet in ten."""
    (tmp_path / "big").write_bytes(random.Random(2).randbytes(40_000_000))
    with machines("lossy") as [lossy], inside(lossy.name):
        chain = "add table inet t; add chain inet t in { type filter hook input priority 0; }"
        run(
            "nft", f"{chain}; add counter inet t lost; add rule inet t in numgen inc mod 10 == 9 counter name lost drop"
        )
        example = start("tftp_server", "--write", "--host", "127.0.0.1", "--root", str(tmp_path))
        transfer(*curl_read(example.port, "big", "copy", "--tftp-blksize", "65464"), cwd=tmp_path)
        transfer(*curl_write(example.port, "written", "big", "--tftp-blksize", "65464"), cwd=tmp_path)
        lost = int(run("nft", "list", "counters").split("packets ")[1].split()[0])
    assert (tmp_path / "big").read_bytes() == (tmp_path / "copy").read_bytes()
    assert (tmp_path / "big").read_bytes() == (tmp_path / "written").read_bytes()
    assert lost > 200


def test_both_ends_in_virtual_time() -> None:
    """12 MB arrive with loss, duplicates and reordering; block numbers start again at 0."""
    source = random.Random(3).randbytes(12_000_000)
    copy = bytearray()
    network = SimulatedNetwork(seed=4, loss=0.1, duplicate=0.05, reorder=0.05, latency=(0.001, 0.003))
    terms = tftp.Terms(block=1428, window=32, timeout=None, accepted={})

    async def main() -> None:
        at = [("192.0.2.1", 1069), ("192.0.2.2", 2069)]
        reader = io.BytesIO(source)

        async def read(size: int) -> bytes:
            return reader.read(size)

        async def write(data: bytes) -> None:
            copy.extend(data)
            network.events.clear()

        async def send() -> None:
            async with await network.connect(*at[1], local_address=at[0]) as connection:
                await tftp.Transfer(connection, terms, confirmed=60_000).send(read)

        async with await network.connect(*at[0], local_address=at[1]) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            transfer = tftp.Transfer(connection, terms, confirmed=60_000)
            await transfer.receive(write, len(source))
            await transfer.confirm()

    with deterministic_scheduling(4):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert copy == source


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\0", b"x"]), max_size=12), st.integers(1, 5))
def test_netascii(pieces: list[bytes], size: int) -> None:
    """Line ends survive, wherever the received data is split."""
    wire = tftp.to_netascii(b"".join(pieces))
    got, rest = b"", b""
    for start in range(0, len(wire) or 1, size):
        data, rest = tftp.from_netascii(bytearray(rest + wire[start : start + size]), start + size >= len(wire))
        got += data
    assert (got, rest) == (b"".join(pieces), b"")
