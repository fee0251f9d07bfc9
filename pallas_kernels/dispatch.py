"""Which implementation of an operation runs: a named one runs or raises, ``None`` picks the best available one."""

import dataclasses
import functools
import importlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from pallas_kernels import private_jax

NAMES = ("xla", "mosaic_gpu", "mosaic_tpu", "cudnn")
# By jax.default_backend(): the first of these that the operation has.
PREFERRED: dict[str, tuple[str, ...]] = {"gpu": ("mosaic_gpu", "cudnn"), "tpu": ("mosaic_tpu",)}
ANY_JAX_VERSION = "DSA_JAX_ANY_JAX_VERSION"  # environment variable: 1 lifts the limit of JAX versions

# What a JAX release that differs from the tested ones makes a kernel raise: a moved module, a private name that is
# gone, a changed signature, a failed check of the compiler. The public functions check the caller's arguments before
# they dispatch, so none of these comes from a wrong call. RuntimeError includes NotImplementedError and XLA's errors.
FAILURES = (ImportError, AttributeError, TypeError, ValueError, LookupError, AssertionError, RuntimeError)

Implementations = Mapping[str, Callable[..., Any]]  # by name

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """``module.function``, imported at the first call: a machine without the backend's compiler imports nothing.

    tested: the first and the last JAX version with which the kernel passed its tests, both included; ``"0.12"`` means
    every 0.12.x. ``None``: it has not passed them on hardware yet. Outside of these it runs only when named.
    """

    module: str
    function: str
    tested: tuple[str, str] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function.

        Raises:
          NotImplementedError: the module cannot be imported here; the message says what is missing.
        """
        try:
            module = importlib.import_module(self.module)
        except ImportError as missing:
            raise NotImplementedError(f"{self.module} cannot be imported: {missing}") from missing
        return getattr(module, self.function)(*args, **kwargs)


def dispatch(
    operation: str,
    implementations: Implementations,
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call one of ``implementations`` (name -> function) with the remaining arguments.

    A named implementation runs, with any JAX version, or its error reaches the caller. ``None`` takes the kernel
    for the default backend (``PREFERRED``) and falls back to ``xla``, logging the reason once, when

    - there is none, or it refuses these arguments (NotImplementedError);
    - it was not tested with this JAX version (``Kernel.tested``) and DSA_JAX_ANY_JAX_VERSION is not 1;
    - importing or tracing it fails (``FAILURES``), or compiling it fails outside of ``jax.jit``.

    Under ``jax.jit`` a kernel is only traced here. It is lowered and compiled after the last traced line, and an error
    that arises there cannot be caught: the limit of JAX versions is what keeps such a kernel from being chosen.

    Raises:
      ValueError: ``implementation`` is not a known name.
      NotImplementedError: the named implementation does not exist or cannot serve these arguments.
    """
    if implementation is not None:
        return _named(operation, implementations, implementation)(*args, **kwargs)
    name = _preferred(implementations)
    if name is None:
        return implementations["xla"](*args, **kwargs)
    result, reason = _attempt(implementations, name, lambda kernel: kernel(*args, **kwargs))
    if reason is None:
        return result
    _log_once(logging.WARNING, f"{operation}: using 'xla', because {reason}")
    return implementations["xla"](*args, **kwargs)


def dispatch_at_lowering(
    operation: str,
    implementations: Implementations,
    implementation: str | None,
    *args: Any,
    **options: Any,
) -> Any:
    """As ``dispatch``, but ``None`` chooses by the platform that the program is lowered for.

    A program compiled ahead of time for TPU on a machine without one needs this. On every platform ``mosaic_tpu`` is
    traced too, and dropped when the program is lowered for another one. The kernel for GPUs is tied to the GPU that it
    is traced on, so it takes part only where there is one. options: keyword arguments, no arrays.
    """
    if implementation is not None:
        return _named(operation, implementations, implementation)(*args, **options)
    xla, backend = functools.partial(implementations["xla"], **options), jax.default_backend()
    kernels = {}
    for platform, of_backend, name in (("tpu", "tpu", "mosaic_tpu"), ("cuda", "gpu", "mosaic_gpu")):
        if name == "mosaic_gpu" and backend != "gpu":
            continue
        _, reason = _attempt(
            implementations, name, lambda kernel: jax.eval_shape(functools.partial(kernel, **options), *args)
        )
        if reason is None:
            kernels[platform] = functools.partial(implementations[name], **options)
            continue
        level = logging.WARNING if backend == of_backend else logging.INFO
        _log_once(level, f"{operation}: using 'xla' on {platform.upper()} too, because {reason}")
    return lax.platform_dependent(*args, **kernels, default=xla) if kernels else xla(*args)


def has_kernel(operation: str, checks: Implementations, implementation: str | None, *args: Any) -> bool:
    """Whether ``dispatch`` would run a kernel and not ``xla``, by the kernel's check (name -> function).

    A check raises NotImplementedError for arguments that the kernel cannot serve. What fails only while the kernel is
    traced is not foreseen. A named implementation whose module is broken raises, as it does in ``dispatch``.
    """
    if implementation is not None:
        if implementation not in checks:
            return False
        try:
            checks[implementation](*args)
        except NotImplementedError:
            return False
        return True
    name = _preferred(checks)
    if name is None or name not in checks:
        return False
    _, reason = _attempt(checks, name, lambda check: check(*args))
    if reason is not None:
        _log_once(logging.WARNING, f"{operation}: using 'xla', because {reason}")
    return reason is None


def _preferred(implementations: Implementations) -> str | None:
    """The name to try on the default backend, or None where ``xla`` is what it runs."""
    names = PREFERRED.get(jax.default_backend(), ())
    return next((name for name in names if name in implementations), names[0] if names else None)


def _attempt(
    implementations: Implementations, name: str, call: Callable[[Callable[..., Any]], Any]
) -> tuple[Any, str | None]:
    """(what ``call`` returns for the implementation, None), or (None, why ``implementation=None`` cannot use it)."""
    if (reason := _unavailable(implementations, name)) is not None:
        return None, reason
    try:
        return call(implementations[name]), None
    except _failures() as error:
        return None, _failed(name, error)


def _failures() -> tuple[type[Exception], ...]:
    return (*FAILURES, *private_jax.compiler_errors())


def _named(operation: str, implementations: Implementations, name: str) -> Callable[..., Any]:
    if name not in NAMES:
        raise ValueError(f"implementation must be None or one of {NAMES}, got {name!r}")
    if name not in implementations:
        raise NotImplementedError(f"{operation} has no {name!r} implementation yet; use 'xla'")
    return implementations[name]


def _unavailable(implementations: Implementations, name: str) -> str | None:
    """Why ``implementation=None`` must not try this implementation, or None if it may."""
    if name not in implementations:
        return f"there is no {name!r} implementation yet"
    kernel = implementations[name]
    if not isinstance(kernel, Kernel):
        return None
    if kernel.tested is None:
        return f"{name!r} has not passed its tests on hardware yet; name it to try it"
    if os.environ.get(ANY_JAX_VERSION) == "1" or _within(jax.__version__, *kernel.tested):
        return None
    first, last = kernel.tested
    return (
        f"{name!r} was tested with JAX {first} to {last} and this is {jax.__version__}; "
        f"{ANY_JAX_VERSION}=1 lifts this limit"
    )


def _within(version: str, first: str, last: str) -> bool:
    """Whether first <= version <= last, where a bound says nothing about the numbers that it leaves out."""
    found, low, high = ([int(n) for n in re.findall(r"\d+", v)] for v in (version, first, last))
    return low <= found[: len(low)] and found[: len(high)] <= high


def _failed(name: str, error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return f"{name!r} cannot: {error}"
    _logger.debug("%s failed", name, exc_info=error)
    first_line = str(error).partition("\n")[0]
    return f"{name!r} failed with {type(error).__name__}: {first_line}"


@functools.cache
def _log_once(level: int, message: str) -> None:
    _logger.log(level, message)
