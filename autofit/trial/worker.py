"""What a worker does (``lifeline.py`` is its main): build a pipe, then answer requests until the
parent closes the connection."""

from __future__ import annotations

import gc
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
