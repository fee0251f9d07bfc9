"""The `dsa-jax` command. `generate` continues a prompt, `compare` compares our model with PyTorch, `convert` and
`verify` turn checkpoints from one layout into another and check them. `aot` (train.aot, found by its entry point)
says ahead of time whether a run fits.

Exit codes: 0 done; 1 a difference beyond the tolerance, a fault found, or logits that are not finite; 2 bad input,
reported in one line on standard error (`--traceback` or DSA_JAX_TRACEBACK=1 shows where it arose).
"""

import dataclasses
import functools
import operator
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any

from dsa_jax.commands.errors import run_command

# Commands of packages that build on this one: entry points of the group "dsa_jax.commands" in pyproject.toml.
PLUGINS = {"aot": "Does a run fit, and where does its time go? Answered ahead of time, without the machine."}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line `args` (default: the process's) and returns the exit code."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in PLUGINS:
        return _run_plugin(args[0], args[1:])
    try:
        import tyro

        from dsa_jax.commands.convert import Convert
        from dsa_jax.commands.verify import Verify
    except ImportError as error:
        print(f"dsa-jax: the command line needs tyro ({error.msg}): pip install tyro", file=sys.stderr)
        return 2
    from dsa_jax.commands.compare import Compare
    from dsa_jax.commands.generate import Generate

    listed = [
        Annotated[_Plugin, tyro.conf.subcommand(name, description=PLUGINS[name])]
        for name in PLUGINS
        if name in _installed()
    ]
    commands: list[Any] = [Generate, Compare, Convert, Verify, *listed]
    command = tyro.cli(
        functools.reduce(operator.or_, commands),
        prog="dsa-jax",
        description="DeepSeek-V3.2 with sparse attention, in JAX.",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    failures = (FloatingPointError,)
    return run_command("dsa-jax", command.run, traceback=command.traceback, failures=failures)


@dataclasses.dataclass(frozen=True)
class _Plugin:
    """An entry of `dsa-jax --help`; the command itself is run by `_run_plugin`."""


def _installed() -> dict[str, Any]:
    """Name -> entry point of every installed plugin."""
    return {point.name: point for point in entry_points(group="dsa_jax.commands")}


def _run_plugin(name: str, args: Sequence[str]) -> int:
    if name in (installed := _installed()):
        return installed[name].load()(args)
    print(
        f"dsa-jax: `{name}` is not registered; install the package again: pip install -e .", file=sys.stderr
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
