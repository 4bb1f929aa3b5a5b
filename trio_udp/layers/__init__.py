"""Layers over any channel. They use no more of it than a layer of your own could: ``send``, ``receive``, ``aclose``.

request.py    ask until there is an answer
typed.py      objects instead of bytes
dtls/         encryption and authentication
"""
