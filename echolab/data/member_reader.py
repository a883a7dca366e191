"""One member of a sample, read in order and piece by piece.

A clip of 81 frames is some 30 MB, most of it known latents of tasks it was not drawn for.  Read
whole, it is written to memory and fetched back for its checksum and again for each tensor; read
piece by piece into memory that is used again, it stays in the processor's caches.
"""

import os

import numpy as np
from isal import isal_zlib

CHUNK = 2**20


class Pieces:
    """`size` bytes of an open file from `offset` on, and the crc32 of what passed."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self.size, self.crc32, self.passed = size, 0, 0
        self._file, self._offset = file, offset
        self._memory = np.empty(min(size, CHUNK), np.uint8)
        self._small = self._read(0, size) if size <= CHUNK else None  # one call is then enough

    def take(self, size: int) -> np.ndarray:
        """The next bytes, uint8 [size], fewer at the end; lost at the next call."""
        size = min(size, self.size - self.passed)
        if self._small is None:
            piece = self._read(self.passed, size)
        else:
            piece = self._small[self.passed : self.passed + size]
        self.passed += len(piece)
        self.crc32 = isal_zlib.crc32(piece, self.crc32)
        return piece

    def _read(self, start: int, size: int) -> np.ndarray:
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        piece, filled = self._memory[:size], 0
        while filled < size:
            at = self._offset + start + filled
            count = os.preadv(self._file, [piece[filled:].data], at)
            if not count:
                break  # the file was cut
            filled += count  # one call reads 2 GiB at most
        return piece[:filled]

    def at(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset within the member, which do not count as passed."""
        return os.pread(self._file, size, self._offset + offset)

    def rest(self) -> bytes:
        """All that is left, to keep; fewer bytes where the file ends."""
        if self._small is not None:
            return self.take(self.size).tobytes()
        data, end = b"", self.size - self.passed
        while more := os.pread(self._file, end - len(data), self._offset + self.passed + len(data)):
            data = data + more if data else more
        self.passed += len(data)
        self.crc32 = isal_zlib.crc32(data, self.crc32)
        return data

    def skip(self, size: int) -> None:
        """Let so many bytes pass, for their checksum."""
        end = self.passed + size
        while self.passed < end and len(self.take(min(CHUNK, end - self.passed))):
            pass
