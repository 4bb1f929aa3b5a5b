"""Steering by address: every datagram of one IP address goes to one socket of a SO_REUSEPORT group, from any port.

The kernel runs a classic BPF program for each datagram (SO_ATTACH_REUSEPORT_CBPF, socket(7)). It returns the index of
the socket in the group, in the order in which the sockets were bound. By default the kernel hashes ports too.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import TypeAlias

import trio

SO_ATTACH_REUSEPORT_CBPF = 51

# From linux/bpf_common.h: class, size, mode and operation of an instruction.
LOAD_WORD = 0x20  # A = the 32 bits at offset k, in network byte order
LOAD_BYTE = 0x30
LOAD_MEMORY = 0x60  # A = M[k]
STORE_MEMORY = 0x02  # M[k] = A
TO_X = 0x07  # X = A
XOR_X = 0xAC
XOR = 0xA4
AND = 0x54
MULTIPLY = 0x24
MODULO = 0x94
SHIFT_RIGHT = 0x74
JUMP_IF_EQUAL = 0x15
RETURN_A = 0x16

NETWORK_HEADER = 0xFFF0_0000  # SKF_NET_OFF: offsets from here are into the IP header
IPV4_SOURCE = NETWORK_HEADER + 12
IPV6_SOURCE = NETWORK_HEADER + 8

Instruction: TypeAlias = tuple[int, int, int, int]  # code, jump if true, jump if false, k


def steering_program(sockets: int, seed: int, ipv4_prefix: int = 32, ipv6_prefix: int = 128) -> list[Instruction]:
    """Return the program that chooses one of ``sockets`` sockets by the source address.

    Args:
      seed: 32 bits, so that strangers do not know which addresses share a socket.
      ipv4_prefix, ipv6_prefix: Number of leading bits of the address to hash.
    """
    ipv4 = _hash_words(seed, [IPV4_SOURCE], ipv4_prefix)
    ipv6 = _hash_words(seed, [IPV6_SOURCE + 4 * word for word in range(4)], ipv6_prefix)
    end = [(MODULO, 0, 0, sockets), (RETURN_A, 0, 0, 0)]
    # A socket for IPv6 may receive IPv4 too.
    version = [(LOAD_BYTE, 0, 0, NETWORK_HEADER), (SHIFT_RIGHT, 0, 0, 4), (JUMP_IF_EQUAL, 0, len(ipv4 + end), 4)]
    return [*version, *ipv4, *end, *ipv6, *end]


def _hash_words(seed: int, offsets: list[int], prefix: int) -> list[Instruction]:
    """Hash the first ``prefix`` bits of the words at ``offsets`` into A; M[0] holds the hash so far."""
    program: list[Instruction] = []
    for number, offset in enumerate(offsets):
        bits = min(max(prefix - 32 * number, 0), 32)
        program += [(LOAD_WORD, 0, 0, offset), (AND, 0, 0, 0xFFFF_FFFF << (32 - bits) & 0xFFFF_FFFF)]
        if number:
            program += [(TO_X, 0, 0, 0), (LOAD_MEMORY, 0, 0, 0), (XOR_X, 0, 0, 0)]
        else:
            program += [(XOR, 0, 0, seed)]
        # The finalizer of MurmurHash3.
        for shift, factor in ((16, 0x85EB_CA6B), (13, 0xC2B2_AE35), (16, 1)):
            program += [(TO_X, 0, 0, 0), (SHIFT_RIGHT, 0, 0, shift), (XOR_X, 0, 0, 0), (MULTIPLY, 0, 0, factor)]
        program += [(STORE_MEMORY, 0, 0, 0)]
    return program


def steer(sock: socket.socket | trio.socket.SocketType, program: list[Instruction]) -> None:
    """Attach a program to the SO_REUSEPORT group of a bound socket.

    Raises:
      OSError: The kernel or this platform refuses.
    """
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    memory = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", len(program), ctypes.addressof(memory))
    )
