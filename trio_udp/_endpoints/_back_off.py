"""Telling persistent faults of reading from passing ones."""

from __future__ import annotations

import attrs

# A socket that polls as readable has something to read: a datagram, or the answer to an earlier one. If more than
# FRUITLESS_READS reads in a row give nothing, and reading still fails or the socket still polls as readable, the fault
# persists; an example is IP_RECVERR with an error queue that is never read. Then read only once in PAUSE seconds, to
# spare the CPU. Strangers cannot cause this: a datagram with a wrong checksum polls as readable and gives nothing, but
# only once.
FRUITLESS_READS = 8
PAUSE = 0.1

# The most reads in a row that give nothing but answers to earlier datagrams. Beyond that the error persists, regardless
# of its cause.
MANY_ANSWERS = 1_024


@attrs.define(eq=False)
class BackOff:
    """Distinguishes persistent faults from passing ones, so that reading does not use up the CPU or fill the log."""

    _fruitless_reads: int = attrs.field(default=0, init=False)
    _answers: int = attrs.field(default=0, init=False)

    @property
    def has_just_read(self) -> bool:
        """Whether the last read gave datagrams, perhaps only truncated or malformed ones."""
        return not self._fruitless_reads

    def read_something(self) -> None:
        self._fruitless_reads = self._answers = 0

    def read_nothing(self) -> None:
        self._fruitless_reads += 1

    def read_answer(self) -> bool:
        """Note an answer to an earlier datagram; return False if there were too many in a row."""
        if self._answers == MANY_ANSWERS:
            return False
        self._answers += 1
        self._fruitless_reads = 0
        return True

    def persists(self, reads: int = 0) -> bool:
        """Whether too many reads in a row gave nothing, including ``reads`` that are not noted yet."""
        return self._fruitless_reads + reads > FRUITLESS_READS
