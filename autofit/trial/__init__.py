"""Measure one plan by a real generation: in this process, or in a worker."""

from autofit.trial.generation import generate
from autofit.trial.measurer import InProcess, Job, Measurer, Subject, Worker
from autofit.trial.meter import is_out_of_memory
from autofit.trial.run import Request, release

__all__ = [
    "InProcess",
    "Job",
    "Measurer",
    "Request",
    "Subject",
    "Worker",
    "generate",
    "is_out_of_memory",
    "release",
]
