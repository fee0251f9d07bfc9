"""Which implementation of an operation runs: a name is an order, ``None`` is a wish."""

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

NAMES = ("xla", "mosaic_gpu", "mosaic_tpu")
PREFERRED = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}  # by jax.default_backend()

# Kernels whose present source has not passed its tests on hardware (docs/benchmarks.md says what did run): they
# run when named, never by default.
UNPROVED: frozenset[tuple[str, str]] = frozenset()

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
    written for the default backend and falls back to ``xla`` when there is none, when it is not proved on
    hardware, or when it refuses these arguments; the reason is logged once.

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
    if (operation, kernel) in UNPROVED:
        _log_once(
            f"{operation}: using 'xla', because {kernel!r} is not proved on hardware yet; name it to try it"
        )
    elif kernel is not None and kernel in implementations:
        try:
            return implementations[kernel](*args, **kwargs)
        except NotImplementedError as refusal:
            _log_once(f"{operation}: using 'xla', because {kernel!r} cannot: {refusal}")
    elif kernel is not None:
        _log_once(f"{operation}: using 'xla', because there is no {kernel!r} implementation yet")
    return implementations["xla"](*args, **kwargs)


def has_kernel(checks: Mapping[str, Callable[..., Any]], implementation: str | None, *args: Any) -> bool:
    """Whether a kernel would run, by its check (name -> function), which raises NotImplementedError if it cannot."""
    name = PREFERRED.get(jax.default_backend()) if implementation is None else implementation
    if name is None or name not in checks:
        return False
    try:
        checks[name](*args)
    except NotImplementedError:
        return False
    return True


def lazy(module: str, function: str) -> Callable[..., Any]:
    """``module.function``, imported at the first call: a machine without the backend's compiler imports nothing.

    Raises (when called):
      NotImplementedError: the module cannot be imported here; the message says what is missing.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            implementation = getattr(importlib.import_module(module), function)
        except ImportError as missing:
            raise NotImplementedError(f"{module} cannot be imported: {missing}") from missing
        return implementation(*args, **kwargs)

    return call


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)
