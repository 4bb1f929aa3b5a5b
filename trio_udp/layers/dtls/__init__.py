"""DTLS 1.2 over any channel of datagrams. Needs the extra ``dtls``; users see it as :mod:`trio_udp.dtls`.

_secure.py       secure() and connect(): where servers and clients begin
_channel.py      DTLSChannel: waiting, repeating, closing
_association.py  OpenSSL, without I/O
_context.py _identity.py _cookies.py _records.py    what these need
"""

try:
    import OpenSSL.SSL
    import service_identity
except ImportError as _missing:
    raise ImportError("trio_udp.dtls needs pyOpenSSL and service-identity: pip install trio-udp[dtls]") from _missing
del OpenSSL, service_identity
