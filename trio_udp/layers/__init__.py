"""Layers over any channel. They use of it what a layer of your own would: ``send``, ``receive``, ``aclose``.

request.py    ask until there is an answer
typed.py      objects instead of bytes
dtls/         encryption and authentication
"""
