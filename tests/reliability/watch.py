"""What happens to the files below a folder, as the kernel tells it (inotify, of Linux)."""

import ctypes
import os
import select
import struct
from pathlib import Path

CREATED, MODIFIED, MOVED_HERE, FOLDER = 0x100, 0x2, 0x80, 0x40000000
HEAD = struct.Struct("iIII")


class Watch:
    """Counts what is written and what is replaced below a folder, which exists.

    Attributes:
        counts: Of each kind so far: ``write`` when a file is made or filled, ``replace`` when one takes
            another's place.
        path: Of the newest.
    """

    def __init__(self, folder: Path) -> None:
        self.counts = {"write": 0, "replace": 0}
        self.path = folder
        self._c = ctypes.CDLL(None, use_errno=True)
        self._handle = self._c.inotify_init1(os.O_NONBLOCK)
        if self._handle < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._folders: dict[int, Path] = {}
        self._add(folder)

    def _add(self, folder: Path) -> None:
        number = self._c.inotify_add_watch(self._handle, os.fsencode(folder), CREATED | MODIFIED | MOVED_HERE)
        if number >= 0:  # it may be gone again
            self._folders[number] = folder
            for inner in folder.iterdir():
                if inner.is_dir():
                    self._add(inner)

    def read(self, seconds: float, kind: str = "", until: int = 0) -> bool:
        """Wait so long for something to happen, and count it.

        Returns:
            Whether ``kind`` has been counted ``until`` times; what follows is not read.
        """
        if not select.select([self._handle], [], [], seconds)[0]:
            return False
        content, place = os.read(self._handle, 65536), 0
        while place < len(content):
            number, mask, _, length = HEAD.unpack_from(content, place)
            place += HEAD.size + length
            name = content[place - length : place].rstrip(b"\0")
            self.path = self._folders[number] / os.fsdecode(name) if number in self._folders else self.path
            if mask & FOLDER and mask & (CREATED | MOVED_HERE):
                self._add(self.path)
            happened = "replace" if mask & MOVED_HERE else "write"
            self.counts[happened] += 1
            if happened == kind and self.counts[kind] == until:
                return True
        return False

    def close(self) -> None:
        """Give the handle back."""
        os.close(self._handle)
