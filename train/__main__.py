"""`python -m train RUN` trains a named run through all its stages, and goes on where a killed one stopped.

Examples:

    python -m train nano_cpu
    python -m train nano --folder runs/short --run.stages.0.steps 100 --run.batch 8
    python -m train nano --init-from CHECKPOINT --lora-rank 16
"""

import dataclasses
import inspect
import os
import sys
from pathlib import Path

from train.config import Lora, Run
from train.runs import RUNS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A named run, what it starts from and where it goes."""

    run: Run
    """Every field of the run can be changed: --run.batch 8, --run.stages.0.steps 100, --run.model.index-topk 64."""
    folder: Path | None = None
    """Where checkpoints and metrics go; default runs/NAME. The same command goes on with what is there."""
    init_from: str | None = None
    """Start from this checkpoint (a Hugging Face or Orbax folder); the model's sizes are then its own."""
    lora_rank: int | None = None
    """Train adapters of this rank (alpha is twice the rank) instead of the weights themselves."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def changed_run(self) -> Run:
        """``run`` with what the other options say about it."""
        rank = self.lora_rank
        lora = self.run.lora if rank is None else Lora(rank=rank, alpha=2.0 * rank)
        return dataclasses.replace(self.run, init_from=self.init_from or self.run.init_from, lora=lora)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 the training stopped (a loss that is not finite); 2 bad input."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    described = {
        name: (inspect.getdoc(function) or "", Options(run=function())) for name, function in RUNS.items()
    }
    options = tyro.extras.overridable_config_cli(
        described, prog="python -m train", description=__doc__, args=arguments
    )
    name = arguments[0]
    show = options.traceback or os.environ.get("DSA_JAX_TRACEBACK")
    from train.workflow import from_checkpoint, train

    try:
        train(from_checkpoint(options.changed_run()), options.folder or Path("runs") / name)
    except (ValueError, NotImplementedError, FloatingPointError, OSError) as error:
        if show:
            raise
        print(f"python -m train: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
