"""Judges cases in a process of its own, so that a case that kills it is one that is known."""

import logging
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from fuzz.cases import Blocks, Failure, Judged

#: Cases that one process judges: what compilers keep of every graph would fill the memory in the end.
_CASES = 2000
_PATIENCE = 5  # seconds for the process to end by itself


class Worker:
    """A process that judges cases, begun anew when one has ended it.

    Attributes:
        timeout: seconds that a case may take.
    """

    def __init__(self, judge: Callable[[str, str, Blocks], Judged], *, timeout: float = 300) -> None:
        """Starts nothing yet.

        Args:
            judge: of kind, route and blocks; a function of a module.
            timeout: seconds that a case may take.
        """
        self._judge, self.timeout = judge, timeout
        self._process: Any = None
        self._pipe: Connection | None = None
        self._left = 0

    def judge(self, kind: str, route: str, blocks: Blocks) -> Judged:
        """What became of a case; "crashed" where the process died of it or did not answer."""
        if not self._left:
            self.close()
            self._start()
        assert self._pipe is not None
        self._left -= 1
        try:
            self._pipe.send((kind, route, blocks))
            if self._pipe.poll(self.timeout):
                found: Judged = self._pipe.recv()
                return found
            fault = "no answer"
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            fault = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.close()
        return Judged("crashed", Failure(kind, route, blocks, fault, f"within {self.timeout:.0f} s"))

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()  # which it ends by
            self._process.join(_PATIENCE)
            self._process.kill()
            self._process.join()
        self._process, self._pipe, self._left = None, None, 0

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._judge), daemon=True)
        self._process.start()
        other.close()
        self._left = _CASES


def quieten() -> None:
    """What drawn cases provoke is said by their verdicts: one thread, no warnings, no log."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("tardis_fx", "torch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _serve(pipe: Connection, judge: Callable[[str, str, Blocks], Judged]) -> None:
    quieten()
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - FX prints the code of what fails
    while True:
        try:
            kind, route, blocks = pipe.recv()
        except (EOFError, ConnectionError):
            return
        pipe.send(judge(kind, route, blocks))
