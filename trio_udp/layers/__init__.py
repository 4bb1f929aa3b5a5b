"""Layers over any channel. Each uses public names only, so a layer of your own can be built in the same way.

request.py    ask until there is an answer
typed.py      objects instead of bytes
"""
