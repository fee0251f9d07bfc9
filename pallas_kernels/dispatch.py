"""Which implementation of an operation runs: a name is an order, ``None`` is a wish."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

NAMES = ("xla", "mosaic_gpu", "mosaic_tpu")
PREFERRED = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}  # by jax.default_backend()

_logger = logging.getLogger(__name__)


def dispatch(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call one of ``implementations`` (name -> function) with the remaining arguments.

    A named implementation runs or its NotImplementedError reaches the caller. ``None`` takes the kernel
    written for the default backend and falls back to ``xla`` when there is none or it refuses these
    arguments; the reason is logged once.

    Raises:
      ValueError: ``implementation`` is not a known name.
      NotImplementedError: the named implementation does not exist or cannot serve these arguments.
    """
    if implementation is not None:
        if implementation not in NAMES:
            raise ValueError(f"implementation must be None or one of {NAMES}, got {implementation!r}")
        if implementation not in implementations:
            raise NotImplementedError(f"{operation} has no {implementation!r} implementation yet; use 'xla'")
        return implementations[implementation](*args, **kwargs)

    kernel = PREFERRED.get(jax.default_backend())
    if kernel is not None and kernel in implementations:
        try:
            return implementations[kernel](*args, **kwargs)
        except NotImplementedError as refusal:
            _log_once(f"{operation}: using 'xla', because {kernel!r} cannot: {refusal}")
    elif kernel is not None:
        _log_once(f"{operation}: using 'xla', because there is no {kernel!r} implementation yet")
    return implementations["xla"](*args, **kwargs)


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)
