"""Running a server as a service. Everything here uses the public names of the package only.

systemd.py      sockets that systemd passes, and notices to it
"""
