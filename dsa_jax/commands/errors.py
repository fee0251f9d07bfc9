"""The one place where an exception becomes one line on standard error and an exit code."""

import os
import sys
from collections.abc import Callable

BAD_INPUT: tuple[type[Exception], ...] = (ValueError, NotImplementedError, OSError, ImportError)
"""What this project raises for input it cannot use; everything else is a mistake in its own code."""


def run_command(
    prog: str,
    command: Callable[[], int],
    *,
    traceback: bool = False,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """The exit code of command(); 2 for bad input, with `prog: message` as one line on standard error.

    failures: exceptions of a run whose input was good, such as a loss that is not finite; their exit code is 1.
    traceback, or DSA_JAX_TRACEBACK in the environment, lets the exception through, to show where it arose.
    """
    try:
        return command()
    except BAD_INPUT + failures as error:
        if traceback or os.environ.get("DSA_JAX_TRACEBACK"):
            raise
        print(f"{prog}: {_message(error)}", file=sys.stderr)
        return 1 if isinstance(error, failures) else 2


def _message(error: Exception) -> str:
    """One line. The operating system's own errors, "[Errno 13] Permission denied: 'x'", become a sentence."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__
