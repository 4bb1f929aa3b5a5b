"""DTLS 1.2: encrypted and authenticated datagrams, for any handler. Needs ``pip install 'trio-udp[dtls]'``.

``trio_udp.dtls.secure(handler, context)`` makes a handler for ``trio_udp.serve``, and ``trio_udp.dtls.connect`` is the
other end. See docs/dtls.md.
"""

from .layers.dtls._channel import DTLSChannel as DTLSChannel
from .layers.dtls._ends import Session as Session
from .layers.dtls._secure import SecuredHandler as SecuredHandler, connect as connect, secure as secure

__all__ = ["DTLSChannel", "SecuredHandler", "Session", "connect", "secure"]

for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
