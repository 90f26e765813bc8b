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
from contextlib import suppress
from multiprocessing import Pipe

CRASH_S = 1.0  # for one that crashed to be gone, with an exit code of its own


class Child:
    """Answers at the other end of ``connection`` (``trial/worker.py``)."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        read_life, self._life = os.pipe()
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

    def end(self) -> tuple[int, str]:
        """End it, with the compilers that it may have started, and wait for it. Returns its exit
        code and its last words."""
        self.connection.close()
        os.close(self._life)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(CRASH_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        with self._log as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 2000))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return code, lines[-1][:300] if lines else ""
