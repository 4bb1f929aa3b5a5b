"""Layers over any channel. They use only what your own layer would use: ``send``, ``receive``, ``aclose``.

request.py    ask until there is an answer
typed.py      objects instead of bytes
dtls/         encryption and authentication
"""
