"""The command line of http3_server.py and game_web.py. A mistake in it is told in one line, with status 2."""

import argparse
import logging
import ssl
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import trio

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65_535:
        raise ValueError
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--cert", metavar="FILE", required=True, help="the server's certificate chain")
    parser.add_argument("--key", metavar="FILE", required=True, help="the certificate's private key")
    return parser


def run(main: Callable[..., Awaitable[None]], parser: argparse.ArgumentParser) -> None:
    """Run ``main`` with the arguments, unless the certificate or a port cannot be used."""
    logging.basicConfig(level=logging.WARNING)
    arguments = parser.parse_args()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(arguments.cert, arguments.key, password="")
    except OSError as error:
        parser.error(f"cannot read the certificate or the key, or they do not match: {error}")
    try:
        trio.run(partial(main, **vars(arguments)))
    except Exception as error:
        cause: Exception = error
        while isinstance(cause, ExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        if not isinstance(cause, OSError):
            raise
        parser.error(str(cause))
