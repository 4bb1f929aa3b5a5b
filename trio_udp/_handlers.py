"""Handlers: their types, the checks on them, how they are called, and how their errors are handled."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import TYPE_CHECKING, TypeAlias, final

import attrs
import trio

from ._channel import was_raised_by
from ._client import Client, seat_of
from ._endpoints import Datagram
from ._lifecycle import CLOSED, LOST
from ._seats import Seat

if TYPE_CHECKING:
    from ._endpoints import Payload

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

Accept: TypeAlias = Callable[[Datagram], bool | bytes]
"""The type of ``accept``, which is called for every stranger; see :func:`serve`."""

OnError: TypeAlias = (
    Callable[[Client, Exception], object]
    | Callable[[Datagram, Exception], object]
    | Callable[[Client | Datagram, Exception], object]
)
"""The type of ``on_error``: called with the client (for a ``datagram_handler`` the datagram) and the exception."""

# An attribute of handlers that layers make: it is called for a stranger after the user's accept, and returns the same
# kinds of answers. See ask_both().
GATE = "_trio_udp_gate"

LOOKS_LIKE = "a handler is an async function with one argument: async def handler(client)"


@final
@attrs.frozen(eq=False, repr=False)
class DatagramHandler:
    """A handler of single datagrams, as :func:`datagram_handler` makes it. Calling it calls the function."""

    function: Callable[[Datagram], Payload | list[bytes] | tuple[Payload, ...] | None]

    def __call__(self, datagram: Datagram) -> Payload | list[bytes] | tuple[Payload, ...] | None:
        return self.function(datagram)

    def __repr__(self) -> str:
        return f"<trio_udp.datagram_handler {getattr(self.function, '__qualname__', self.function)}>"


Handler: TypeAlias = Callable[[Client], Awaitable[object]] | DatagramHandler
"""What a server runs for each client: an async function of a client, or a :func:`datagram_handler`."""


def datagram_handler(
    function: Callable[[Datagram], Payload | list[bytes] | tuple[Payload, ...] | None],
) -> DatagramHandler:
    """Turn a plain function that answers one datagram at a time into a handler: ``@datagram_handler``.

    For protocols in which each datagram is answered by itself (DNS, NTP, STUN), and for collectors (syslog, StatsD,
    NetFlow)::

        @trio_udp.datagram_handler
        def time(datagram):
            return b"%d" % trio.current_time()

    The server calls it for every datagram, **in arrival order over all senders**, and sends the returned bytes (``b""``
    is an empty reply, ``None`` is no reply) back to the datagram's peer, from the address that it was sent to. A list
    or a tuple of payloads is sent as so many datagrams, in order. Replies leave together with the others of the batch,
    or of up to four batches while more datagrams wait in the kernel. A list of 12 or more leaves at once, unless
    earlier replies wait. There are no clients, tasks or inboxes. The function runs in the receive loop, so it should be
    quick: nothing is received meanwhile. ``Limits.rate_limit`` applies, and ``Limits.amplification`` to what is
    returned for one datagram, which is withheld as a whole. The limits on clients and inboxes do not, nor does
    ``idle_timeout``.

    Errors:
      An exception in the function goes to ``on_error(datagram, exception)``, and the next datagram follows. A reply
      that finds the send buffer full is dropped and counted under ``EAGAIN``. Anything but a plain function of one
      argument raises ``TypeError`` at once.
    """
    if not callable(function):
        raise TypeError(f"a datagram_handler is a plain function with one argument, def f(datagram), not {function!r}")
    if is_async(function):
        raise TypeError(
            f"a datagram_handler is a plain function, def f(datagram), not the async function {function!r}: "
            "use request_handler, or a handler of clients"
        )
    if not accepts(function, 1):
        raise TypeError(f"a datagram_handler must be a function of a Datagram, not {function!r}")
    return DatagramHandler(function)


def ask_both(accept: Accept | None, handler: object) -> Accept | None:
    """Combine the user's ``accept`` with the gate of a handler, if it has one."""
    gate: Accept | None = getattr(handler, GATE, None)
    if accept is None or gate is None:
        return accept or gate
    return lambda datagram: gate(datagram) if (answer := accept(datagram)) is True else answer


def show_as(client: Client, channel: Client) -> None:
    """Let the server show a client as the channel of a layer over it, in ``Server.clients`` and ``send_to_all``."""
    seat = seat_of(client)
    if seat in seat.shared.running:
        seat.shared.running[seat] = channel
        seat.shared.layered = True


class NotAwaitable(TypeError):
    """The handler is a plain function, and what it returned is not awaitable."""


async def run_handler(handler: Callable[[Client], Awaitable[object]], seat: Seat, client: Client) -> None:
    """Call a handler for a client, and again while it leaves datagrams behind; then remove the client.

    A call that takes no datagram is the last one; otherwise the handler might be called for ever.
    """
    try:
        while True:
            taken_before = seat.delivered
            try:
                awaitable = handler(client)
                if type(awaitable) is not CoroutineType:  # in the usual case, avoid a call
                    check_awaitable(handler, awaitable)
                await awaitable
            except NotAwaitable as error:
                return seat.shared.crash(error)
            except BaseException as error:
                handler_raised(client, error)
            if not seat.payloads or seat.delivered == taken_before:
                return
    finally:
        seat.finish(CLOSED)
        seat.shared.remove(seat)


def check_awaitable(handler: object, returned: Awaitable[object]) -> Awaitable[object]:
    """Return the return value of a handler; raise ``NotAwaitable`` if it cannot be awaited."""
    if not inspect.isawaitable(returned):
        raise NotAwaitable(f"handler {handler!r} returned {returned!r}, not an awaitable: {LOOKS_LIKE}")
    return returned


def handler_raised(client: Client, error: BaseException) -> None:
    """Report the exception being handled if it is an error of the handler; otherwise re-raise it."""
    if isinstance(error, Exception) and not isinstance(error, NotAwaitable):
        return handler_failed(client, error)
    if isinstance(error, BaseExceptionGroup):
        # From a nursery in the handler. Report its Exceptions and re-raise Cancelled; if it holds another
        # BaseException, raise the whole group.
        errors, others = error.split(Exception)
        if errors is not None and others is not None and others.split(trio.Cancelled)[1] is None:
            handler_failed(client, errors)
            raise others from None
    del error  # its traceback refers to this frame: avoid a reference cycle
    raise


def handler_failed(client: Client, error: Exception) -> None:
    """Count an error of a handler and call ``on_error``, unless the error only says that the conversation is over."""
    seat = seat_of(client)
    if seat.shared.crashing:  # raised by on_error, through a nursery in the handler
        raise error
    if not is_normal_end(error, seat):
        seat.shared.handler_errors += 1
        try:
            seat.shared.on_error(client, error)
        except BaseException:
            seat.shared.crashing = True
            raise


def is_normal_end(error: Exception, seat: Seat) -> bool:
    """Whether an exception only says that the conversation is over, perhaps from a nursery in the handler."""
    if isinstance(error, ExceptionGroup):
        return all(is_normal_end(inner, seat) for inner in error.exceptions)
    if isinstance(error, trio.ClosedResourceError):
        return seat.end is LOST or seat.outbox.engine.closed or was_raised_by(error, seat)
    return isinstance(error, trio.EndOfChannel)


def check_handler(handler: object) -> None:
    """Raise ``TypeError`` for an invalid handler now, rather than fail at the first datagram."""
    if isinstance(handler, DatagramHandler):
        return
    if inspect.isclass(handler):
        raise TypeError(f"handler is a class, {handler!r}: {LOOKS_LIKE}; pass a bound method of an instance")
    if inspect.iscoroutine(handler):
        handler.close()  # or Python warns that it was never awaited
        raise TypeError(f"handler has been called already, {handler!r}: {LOOKS_LIKE}; pass it without calling it")
    if not callable(handler):
        raise TypeError(f"handler cannot be called, {handler!r}: {LOOKS_LIKE}")
    called = unwrapped(handler)
    if inspect.isasyncgenfunction(called):
        raise TypeError(f"handler is an async generator function, {handler!r}: {LOOKS_LIKE}, without yield")
    if inspect.isgeneratorfunction(called):
        raise TypeError(f"handler is a generator function, {handler!r}: {LOOKS_LIKE}, without yield")
    if not accepts(handler, 1):
        raise TypeError(f"handler cannot be called with one argument, {handler!r}: {LOOKS_LIKE}")


def is_async(function: object) -> bool:
    called = unwrapped(function)
    return inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)


def accepts(function: Callable[..., object], arguments: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C functions have no signature, nor has a partial with too many arguments
        return not isinstance(function, functools.partial)
    try:
        signature.bind(*[None] * arguments)
    except TypeError:
        return False
    return True


def unwrapped(function: object) -> object:
    """Unwrap ``partial``, and return ``__call__`` of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function) or inspect.isbuiltin(function)):
        return getattr(type(function), "__call__", function)  # noqa: B004  # needs the method, not a test
    return function
