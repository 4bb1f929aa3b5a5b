"""DTLS 1.2 over any channel of datagrams. Needs the extra ``dtls``; users see it as :mod:`trio_udp.dtls`.

_secure.py       secure() and connect(): what servers and clients call
_channel.py      DTLSChannel: waiting, retransmitting, closing
_association.py  OpenSSL, without I/O
_context.py _identity.py _cookies.py _records.py _ends.py _over_client.py    their parts
"""

try:
    import OpenSSL.SSL
    import service_identity
except ImportError as _missing:
    raise ImportError("trio_udp.dtls needs pyOpenSSL and service-identity: pip install 'trio-udp[dtls]'") from _missing
del OpenSSL, service_identity
