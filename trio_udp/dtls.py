"""DTLS 1.2: encrypted and authenticated datagrams, for any handler. Needs ``pip install trio-udp[dtls]``.

``trio_udp.dtls.secure(handler, context)`` makes a handler for ``trio_udp.serve``, and ``trio_udp.dtls.connect`` is the
other end. See docs/dtls.md.
"""

try:
    import OpenSSL.SSL
    import service_identity
except ImportError as error:
    raise ImportError("trio_udp.dtls needs pyOpenSSL and service-identity: pip install trio-udp[dtls]") from error
del OpenSSL, service_identity

from .layers.dtls._channel import DTLSChannel as DTLSChannel, Session as Session
from .layers.dtls._secure import SecuredHandler as SecuredHandler, connect as connect, secure as secure

__all__ = ["DTLSChannel", "SecuredHandler", "Session", "connect", "secure"]

for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
