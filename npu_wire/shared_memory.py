"""Memory that a server shares with a client on its host, so that a tensor is copied once on its way.

The server owns an `Arena`: an anonymous file that it alone may write, in slots of its own choosing. The
client has a `Window`: a read-only mapping of the same file. A slot belongs to the client from the moment that
the wire names it until the client gives its number back, and is not written in that time. Nothing has a name
in a file system: when both processes are gone, however they died, the kernel frees everything.

Trust: each end lets only its own user near, by what the kernel says of the other end. The file cannot shrink,
so no access faults; the client cannot write to it. The server keeps positions and sizes in its own memory and
takes nothing but slot numbers from the client: one that gives a slot back too early reads wrong bytes itself.
"""

import bisect
import contextlib
import fcntl
import mmap
import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npu_wire.layer_map import Array

TOKEN_BYTES = 32
SMALLEST_TENSOR = 16_384
"""Below, sending the bytes costs less than looking after a slot."""

_NAME = "npu-in-the-loop-"
_NAME_DIGITS = 32
# Slots begin at a cache line, so that no kernel meets a tensor that begins anywhere.
_ALIGNMENT = 64
_SIZE = struct.Struct("<Q")
_READY = b"\x01"
_HANDSHAKE_S = 5.0
_NUMBERS_IN_A_PACKET = 512
# Packets of one look into the socket: a client that floods it does not hold its own stream up for ever.
_PACKETS_AT_ONCE = 64
# <linux/fcntl.h>; Python does not know the last one before 3.13.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 1, 2, 4, 16

SUPPORTED = hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")
"""Whether this system has what it takes: Linux does."""


class NotShared(Exception):
    """There is no shared memory with this peer; the message says why, without any name."""


@dataclass(frozen=True)
class Slot:
    """Bytes in an arena.

    Attributes:
        number: never used twice.
        offset: position in the arena.
        nbytes: size.
    """

    number: int
    offset: int
    nbytes: int


class Arena:
    """The writing end; for one thread.

    Free places are taken from the beginning, so that memory is committed as far as it is needed at once.

    Args:
        nbytes: size.
        commit: asked before so many more bytes are committed; False: not now.
        peer: socket to the reading end.

    Attributes:
        committed: bytes of memory that it has taken; they stay with it.

    Raises:
        NotShared: this system cannot do it.
    """

    def __init__(self, nbytes: int, commit: Callable[[int], bool], peer: socket.socket) -> None:
        self.committed = 0
        self.nbytes = nbytes
        self._commit = commit
        self._peer = peer
        self._next = 1
        self._out: dict[int, Slot] = {}
        self._free: list[tuple[int, int]] = [(0, nbytes)]
        try:
            self._file = os.memfd_create("npu-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise NotShared(f"this system gives no anonymous memory ({error.strerror})") from None
        try:
            os.ftruncate(self._file, nbytes)
            self._memory: Array | None = np.frombuffer(mmap.mmap(self._file, nbytes), np.uint8)
            seals = _SEAL_SHRINK | _SEAL_GROW | _SEAL_FUTURE_WRITE | _SEAL_SEAL
            fcntl.fcntl(self._file, _ADD_SEALS, seals)
        except OSError as error:
            os.close(self._file)
            raise NotShared(f"this system cannot seal anonymous memory ({error.strerror})") from None

    def hand_over(self) -> None:
        """Gives the reading end its descriptor and waits until it is mapped there.

        Raises:
            OSError, NotShared: it does not happen.
        """
        try:
            socket.send_fds(self._peer, [_SIZE.pack(self.nbytes)], [self._file])
        finally:
            os.close(self._file)  # the mapping keeps the memory
        if self._peer.recv(len(_READY)) != _READY:
            raise NotShared("the client could not map it")
        self._peer.setblocking(False)

    def place(self, data: memoryview) -> Slot | None:
        """Copies bytes into a free slot; None: there is no room now, or no reader any more."""
        self._take_back()
        size = -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
        fitting = (index for index, (_, room) in enumerate(self._free) if room >= size)
        index = next(fitting, None)
        if index is None or self._memory is None:
            return None
        offset, room = self._free[index]
        more = offset + size - self.committed
        if more > 0:
            if not self._commit(more):
                return None
            self.committed += more
        self._free[index : index + 1] = [(offset + size, room - size)] if room > size else []
        slot = Slot(self._next, offset, data.nbytes)
        self._next += 1
        self._out[slot.number] = slot
        np.copyto(self._memory[offset : offset + data.nbytes], np.frombuffer(data, np.uint8))
        return slot

    def close(self) -> None:
        """Writes no more and unmaps; idempotent. The client's mapping lives as long as its tensors."""
        self._memory = None
        self._peer.close()

    def _take_back(self) -> None:
        """Frees the slots that the reader has given back, without waiting."""
        if self._memory is None:
            return
        try:
            for _ in range(_PACKETS_AT_ONCE):
                packet = self._peer.recv(_NUMBERS_IN_A_PACKET * _SIZE.size)
                if not packet:
                    self.close()  # the reader has closed
                    return
                for (number,) in _SIZE.iter_unpack(packet):
                    self._release(self._out.pop(number))
        except BlockingIOError:
            pass
        except (OSError, struct.error, KeyError):
            self.close()  # a slot that it does not have, or no number at all

    def _release(self, slot: Slot) -> None:
        begin, end = slot.offset, slot.offset + -(-slot.nbytes // _ALIGNMENT) * _ALIGNMENT
        index = bisect.bisect(self._free, (begin, 0))
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == begin:
            index -= 1
            begin = self._free.pop(index)[0]
        self._free.insert(index, (begin, end - begin))


class Window:
    """The reading end: tensors in it are read in place, and their slots go back when nobody refers to them.

    A process that is forked from this one must copy the tensors that it wants to keep.

    Args:
        peer: socket to the writing end, which is connected.
        token: what the writing end knows the connection by.

    Raises:
        NotShared: the other end is another user's, does not answer, or its memory is not sealed.
    """

    def __init__(self, peer: socket.socket, token: bytes) -> None:
        try:
            require_own_user(peer)
            peer.settimeout(_HANDSHAKE_S)
            peer.sendall(token)
            packet, files, _, _ = socket.recv_fds(peer, _SIZE.size, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise NotShared(f"the server's own socket fails ({error.strerror or error})") from None
        try:
            if len(packet) != _SIZE.size or len(files) != 1:
                raise NotShared("the server does not know the connection")
            self._memory = _map_sealed(files[0], _SIZE.unpack(packet)[0])
        finally:
            for file in files:
                os.close(file)
        try:
            peer.sendall(_READY)
        except OSError as error:
            raise NotShared(f"the server's own socket fails ({error.strerror or error})") from None
        self._returns = _Returns(peer)

    def view(self, number: int, offset: int, nbytes: int) -> memoryview:
        """A slot's bytes; read-only. The slot goes back when nobody refers to them or an array of them.

        Raises:
            ValueError: it is not in the memory.
        """
        if nbytes == 0 or offset + nbytes > len(self._memory):
            raise ValueError(f"{nbytes} bytes at {offset} of {len(self._memory)}")
        self._returns.flush()
        array = np.frombuffer(self._memory, np.uint8, nbytes, offset)
        weakref.finalize(array, self._returns.give, number).atexit = False
        return array.data

    def flush(self) -> None:
        """Gives back what the socket had no room for; also to be called when a tensor comes in messages."""
        self._returns.flush()

    def close(self) -> None:
        """Takes no more tensors; those that there are stay valid. Idempotent."""
        self._returns.close()


class _Returns:
    """Gives slots back from wherever a tensor happens to end: no lock, no waiting.

    A forked process ends its copies of tensors without a word.
    """

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._numbers: deque[int] = deque()
        self._full = False
        self._process = os.getpid()

    def give(self, number: int) -> None:
        """Gives one back, unless the socket is full."""
        if os.getpid() == self._process:
            self._numbers.append(number)
            if not self._full:
                self.flush()

    def flush(self) -> None:
        """Gives back as many as the socket has room for."""
        while numbers := self._some():
            try:
                self._peer.send(b"".join(map(_SIZE.pack, numbers)))
            except BlockingIOError:
                self._numbers.extend(numbers)
                self._full = True
                return
            except OSError:  # the server has closed: there is nothing to give back to
                return
        self._full = False

    def close(self) -> None:
        self._peer.close()

    def _some(self) -> list[int]:
        numbers: list[int] = []
        with contextlib.suppress(IndexError):
            while len(numbers) < _NUMBERS_IN_A_PACKET:
                numbers.append(self._numbers.popleft())
        return numbers


def listen(name: str) -> socket.socket:
    """A socket of this process's own for clients to connect to.

    Args:
        name: 32 hexadecimal digits, random.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + _NAME + name)
    listener.listen()
    return listener


def open_window(name: str, token: bytes) -> Window:
    """Takes up what a server has offered.

    Args:
        name: 32 hexadecimal digits.
        token: proves to the server which stream this is.

    Raises:
        NotShared: it cannot be had from here.
    """
    if len(name) != _NAME_DIGITS or not set(name) <= set("0123456789abcdef"):
        raise NotShared("the server's offer makes no sense")
    try:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise NotShared(f"this process can open no socket ({error.strerror})") from None
    try:
        peer.settimeout(_HANDSHAKE_S)
        peer.connect("\0" + _NAME + name)
    except OSError:
        peer.close()
        raise NotShared("the server is on another host, or in another container") from None
    try:
        return Window(peer, token)
    except BaseException:
        peer.close()
        raise


def receive_token(peer: socket.socket) -> bytes:
    """What a client that has connected shows.

    Raises:
        OSError, NotShared: nothing, in a while, or it is another user.
    """
    require_own_user(peer)
    peer.settimeout(_HANDSHAKE_S)
    return peer.recv(TOKEN_BYTES)


def require_own_user(peer: socket.socket) -> None:
    """Asks the kernel who is at the other end.

    Raises:
        NotShared: another user.
    """
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.geteuid():
        raise NotShared("the other end runs as another user")


def _map_sealed(file: int, nbytes: int) -> Any:
    """Maps memory that cannot shrink under its reader."""
    try:
        sealed = fcntl.fcntl(file, _GET_SEALS) & _SEAL_SHRINK
        if not sealed or not 0 < nbytes <= os.fstat(file).st_size:
            raise NotShared("the server's memory is not sealed")
        return mmap.mmap(file, nbytes, prot=mmap.PROT_READ)
    except OSError as error:
        raise NotShared(f"the server's memory cannot be mapped ({error.strerror})") from None
