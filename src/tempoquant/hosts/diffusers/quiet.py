"""The output of diffusers and transformers: progress bars and advice."""

import multiprocessing
import os


def quiet_libraries() -> None:
    """Silence the progress bars and the advice of diffusers and transformers; their errors still
    arrive.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # for child processes
        os.environ.setdefault(name, "error")
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def quiet_workers() -> None:
    """Silence a worker process, whose bars would mix with those of its parent and of other
    workers.
    """
    if multiprocessing.parent_process() is not None:
        quiet_libraries()
