"""Echo over DTLS: a server, and a client that verifies its certificate.

The handler is written for plain UDP. ``secure`` and a certificate add the encryption.

    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=localhost \\
        -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem
    python examples/dtls_echo.py --cert cert.pem --key key.pem
    python examples/dtls_echo.py --ask hello --trust cert.pem       (in another terminal; it prints the answer)
    openssl s_client -dtls1_2 -connect localhost:9999 -CAfile cert.pem
"""

import argparse
import signal
import sys
from functools import partial

import trio
from OpenSSL import SSL

import trio_udp


async def echo(client: trio_udp.Client) -> None:
    async for payload in client:
        print(f"{client.peer_address[0]} wrote {payload!r}")
        await client.send(payload)


async def serve(host: str | None, port: int, certificate: str, key: str) -> None:
    context = SSL.Context(SSL.DTLS_METHOD)
    context.use_certificate_chain_file(certificate)
    context.use_privatekey_file(key)
    handler = trio_udp.dtls.secure(echo, context)
    limits = trio_udp.Limits(
        max_clients=2_000,  # 75 KB each
        clients_per_host=200,
        rate_limit=trio_udp.RateLimit(200),  # a handshake takes as much CPU time as 40 echoes
    )
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(trio_udp.serve, handler, port, host=host, limits=limits, stop_signals=stop_signals)
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
    print(f"handshakes: {handler.handshakes}, failed: {handler.handshakes_failed} (last: {handler.last_error})")


async def ask(host: str, port: int, trusted: str | None, line: str, seconds: float) -> str | None:
    """Print the answer to a line. Return an error message, or None."""
    context = SSL.Context(SSL.DTLS_METHOD)
    if trusted is None:
        context.set_default_verify_paths()
    else:
        context.load_verify_locations(trusted)
    try:
        with trio.fail_after(seconds):
            async with await trio_udp.dtls.connect(host, port, context) as channel:
                await channel.send(line.encode())
                print((await channel.receive()).decode())
    except ConnectionRefusedError:
        return f"nothing listens on {host} port {port}"
    except OSError as error:
        return f"cannot ask {host} port {port}: {error.strerror}"
    except (trio.BrokenResourceError, trio.EndOfChannel) as error:
        return str(error) or "the server has closed the connection"
    except trio.TooSlowError:
        return f"no answer within {seconds:g} seconds"
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="to bind, all interfaces by default; with --ask, the server (localhost)")
    parser.add_argument(
        "--cert", metavar="FILE", help="the server's certificate, followed by intermediate certificates"
    )
    parser.add_argument("--key", metavar="FILE", help="the certificate's private key")
    parser.add_argument("--ask", metavar="LINE", help="be the client: send this line and print the answer")
    parser.add_argument("--trust", metavar="FILE", help="certificates to trust; those of the system by default")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="with --ask")
    arguments = parser.parse_args()
    if arguments.ask == "":
        parser.error("--ask: DTLS has no empty payloads")
    if arguments.ask is None and (arguments.cert is None or arguments.key is None):
        parser.error("a server needs --cert and --key")
    try:
        if arguments.ask is None:
            trio.run(serve, arguments.host, arguments.port, arguments.cert, arguments.key)
        else:
            host = arguments.host or "localhost"
            sys.exit(trio.run(ask, host, arguments.port, arguments.trust, arguments.ask, arguments.timeout))
    except SSL.Error as error:
        sys.exit(f"cannot read the certificate or the key, or they do not match: {error}")
