"""A worker's process, seen from the one that starts it: it ends with that, however that ends.

Light, so that it can be started before torch is loaded here: it loads torch itself meanwhile.
``lifeline.py`` is its main.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe

from autofit import host

CRASH_S = 1.0  # for one that crashed to be gone, with an exit code of its own


class Child:
    """Answers at the other end of ``connection`` (``trial/worker.py``)."""

    def __init__(self) -> None:
        self._ended: tuple[int, str] | None = None
        self.connection, theirs = Pipe()
        read_life, write_life = os.pipe()
        self._life: int | None = write_life
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed at its end
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "autofit.lifeline", str(theirs.fileno()), str(read_life)],
                pass_fds=(theirs.fileno(), read_life),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ},
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        os.close(read_life)

    def end(self, wait_s: float = CRASH_S) -> tuple[int, str]:
        """End it, with the compilers that it may have started, and wait for it. Returns its exit
        code and its last words, also a second time, and after a first that was interrupted."""
        if self._ended is None:
            self._ended = self._killed(wait_s)
        return self._ended

    def _killed(self, wait_s: float) -> tuple[int, str]:
        self.connection.close()
        life, self._life = self._life, None
        if life is not None:
            os.close(life)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        with self._log as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 2000))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return code, lines[-1][:300] if lines else ""


@contextmanager
def begun(host_ram_bytes: int | None, workers: int) -> Iterator[Child | None]:
    """A worker's process that loads torch while this one does, if this one has yet to; one that
    nobody has taken by the end is killed. ``workers``: how many will divide the cores."""
    if "torch" in sys.modules:
        yield None
        return
    with host.granted(host_ram_bytes), host.shared(workers):
        child = Child()
    try:
        yield child
    finally:
        child.end(0)
