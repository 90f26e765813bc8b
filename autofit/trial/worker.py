"""The worker's main: build a pipe, then answer requests until the parent closes the connection.

python -m autofit.trial.worker CONNECTION_FD LIFE_FD
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

from autofit import architectures, pinning, probe
from autofit.probe import memory
from autofit.spec import BadInput, NothingFits
from autofit.trial.cap import Outside
from autofit.trial.measurer import Job, subject_of
from autofit.trial.run import Request, measure


def serve(connection: Connection) -> None:
    job = connection.recv()
    assert isinstance(job, Job)
    try:
        torch_device = probe.device_named(job.device)
        before_bytes = memory.before_context(torch_device)
        device = probe.probe_device(job.device)  # first: it measures the context by making it
        pipe = architectures.load(job.model, dtype=job.dtype)
        outside = Outside.of(torch_device, device, before_bytes)
        subject = subject_of(pipe, device, outside)
    except BadInput as error:
        connection.send(str(error))
        return
    # What is there by now stays: the collection after each trial need not look through it.
    gc.collect()
    gc.freeze()
    connection.send(subject)
    with pinning.kept():
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            assert isinstance(request, Request)
            try:
                connection.send(measure(pipe, request, outside))
            except NothingFits as error:
                connection.send(str(error))


def _die_with_parent(life: int) -> None:
    """The parent holds the other end; when it is gone, however it went, this read returns. The
    compilers that this process may have started go with it."""
    os.read(life, 1)
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_die_with_parent, args=(int(sys.argv[2]),), daemon=True).start()
    serve(connection)


if __name__ == "__main__":
    main()
