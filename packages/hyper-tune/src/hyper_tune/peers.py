"""What has become of the other processes of the job, for a message when one does not answer."""

import os
import socket
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from hyper_tune.errors import PeerLostError, UserError
from hyper_tune.parallel import world_size

T = TypeVar("T")
_PATIENCE_SECONDS = 1.0
_MISTAKE = "hyper-tune/mistake"
_LOST = ("gloo", "Connection reset by peer", "Connection closed by peer", "Broken pipe")


@dataclass(frozen=True)
class Peers:
    """Host and process of each rank, exchanged at the start; a process knows those of its host.

    ``places``: a checksum of the host's name and the process id, by rank; none without a group.
    """

    places: tuple[tuple[int, int], ...] = ()

    @classmethod
    def meet(cls, device: torch.device) -> "Peers":
        """Tell every rank where this one is; all ranks must call it, at the start of each run."""
        if not dist.is_initialized():
            return cls()
        _asked_of_the_store(lambda store: store.delete_key(_MISTAKE))  # an earlier run's
        here = torch.tensor([zlib.crc32(socket.gethostname().encode()), os.getpid()], device=device)
        everywhere = [torch.empty_like(here) for _ in range(world_size())]
        dist.all_gather(everywhere, here)
        return cls(tuple((host, process) for host, process in torch.stack(everywhere).tolist()))

    def tell(self, mistake: Exception) -> None:
        """Leave the text of an error that ends this process to those that wait for it.

        It is in the job's store, so that no step exchanges anything for it. Where that is not the
        launcher's, as torchrun's is, but rank 0's, it ends with rank 0.
        """

        def leave(store: Store) -> str:
            store.set(_MISTAKE, str(mistake))
            return _left(store)

        if self.places:
            _asked_of_the_store(leave)

    def explain(self, error: BaseException, where: str) -> PeerLostError | UserError | None:
        """Return what to say where ``error`` is that of a collective that cannot end; else None.

        It is the error that another process was told to leave by `tell`, if there is one. A process
        that has just died is given a second to disappear.
        """
        if not _is_of_a_collective(error):
            return None
        if self.places and (mistake := _asked_of_the_store(_left)):
            return UserError(mistake)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not (fates := self._fates()) and time.monotonic() < deadline:
            time.sleep(0.02)
        said = "; ".join(fates) or (
            "none on this machine has ended or is stopped, so one hangs, or is on another machine"
        )
        return PeerLostError(
            f"{where}: the other processes do not answer: {said}. What was saved stays; start the "
            "job again with resume_from_checkpoint=True."
        )

    def _fates(self) -> list[str]:
        """Name each process of this host that cannot answer."""
        here = {host for host, process in self.places if process == os.getpid()}
        states = [_state(process) if host in here else "?" for host, process in self.places]
        words = dict.fromkeys("ZX", "has ended") | dict.fromkeys("Tt", "is stopped")
        return [
            f"rank {number} (process {process}) {words[state]}"
            for number, ((_, process), state) in enumerate(zip(self.places, states, strict=True))
            if state in words
        ]


def _asked_of_the_store(ask: Callable[[Store], T]) -> T | None:
    """Return what the job's store answers within a second; its process may have ended, or hang."""
    answers: list[T] = []

    def asked() -> None:
        with suppress(RuntimeError, ValueError):
            answers.append(ask(_get_default_store()))

    thread = Thread(target=asked, daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    return answers[0] if answers else None


def _left(store: Store) -> str:
    """Return what was left in the store, or nothing; what was set before is there by then."""
    return str(store.get(_MISTAKE).decode()) if store.check([_MISTAKE]) else ""


def _is_of_a_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def _state(process: int) -> str:
    """Return the letter of a process's state in /proc; X where there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X"
    # The name in parentheses may hold anything.
    return text.rpartition(")")[2].split()[0]
