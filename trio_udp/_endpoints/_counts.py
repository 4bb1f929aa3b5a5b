"""Running counts of sent datagrams and of errors."""

from __future__ import annotations

import errno

import attrs


@attrs.define(eq=False)
class Sender:
    """Running counts of the datagrams sent by one client, one connection, or the program itself."""

    sent: int = attrs.field(default=0, init=False)
    bytes_sent: int = attrs.field(default=0, init=False)
    send_errors: int = attrs.field(default=0, init=False)
    # By errno name. Built at the first error: most clients never see one, and there may be 100,000 of them.
    _errors: dict[str, int] | None = attrs.field(default=None, init=False)

    @property
    def errors(self) -> dict[str, int]:
        return dict(self._errors or {})

    def count_send_error(self, error: OSError) -> None:
        self.send_errors += 1
        self._count(error)

    def _count(self, error: OSError) -> None:
        if self._errors is None:
            self._errors = {}
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        self._errors[name] = self._errors.get(name, 0) + 1


@attrs.define(eq=False)
class SocketCounts(Sender):
    """Running counts of the datagrams that one socket has sent, and of its errors in both directions."""

    receive_errors: int = attrs.field(default=0, init=False)

    def count_receive_error(self, error: OSError) -> None:
        self.receive_errors += 1
        self._count(error)
