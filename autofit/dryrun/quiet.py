"""Other people's libraries without their advice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def others_quiet() -> Iterator[None]:
    """Without the libraries' advice on how a pipeline is written: it is not the user's."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggings: list[Any] = [diffusers_logging, transformers_logging]
    before = [logging.get_verbosity() for logging in loggings]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logging in loggings:
            logging.set_verbosity_error()
        try:
            yield
        finally:
            for logging, verbosity in zip(loggings, before, strict=True):
                logging.set_verbosity(verbosity)
