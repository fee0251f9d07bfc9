"""`python -m train RUN` trains a named run through all its stages, or resumes it where it was interrupted.

Examples:

    python -m train nano_cpu
    python -m train nano --folder runs/short --run.stages.0.steps 100 --run.batch 8
    python -m train nano --init-from CHECKPOINT --lora-rank 16
    python -m train nano --mesh.expert 2 --mesh.tensor 2       # data defaults to the devices that are left
    srun python -m train nano --distributed --mesh.expert 2    # once per host or GPU; on TPU pods without srun

With several hosts: --distributed, or --coordinator, --num-processes and --process-id; docs/scaling.md, "Several hosts".
"""

import dataclasses
import inspect
import sys
from pathlib import Path

from dsa_jax.commands.errors import run_command
from train.config import Lora, MeshSpec, Run, differences, to_json
from train.distributed import Hosts, connected, exit_code
from train.runs import RUNS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Hosts):
    """A named run: what it starts from, where results go, and the mesh."""

    run: Run
    """Every field of the run can be changed: --run.batch 8, --run.stages.0.steps 100, --run.model.index-topk 64."""
    folder: Path | None = None
    """Where checkpoints and metrics go; default runs/NAME. Rerun the command to resume an interrupted run."""
    init_from: str | None = None
    """Start from this checkpoint (a Hugging Face or Orbax folder) and use its model sizes."""
    ignore: tuple[str, ...] = ()
    """Keys of the config.json of --init-from that are unknown here and do not change the model."""
    lora_rank: int | None = None
    """Train adapters of this rank (with alpha twice the rank) instead of the weights."""
    mesh: MeshSpec = MeshSpec()
    """Mesh axes over all devices. Default: the mesh of the run, or one device."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def changed_run(self) -> Run:
        """``run`` with the other options applied."""
        rank = self.lora_rank
        lora = self.run.lora if rank is None else dataclasses.replace(Lora(rank=rank), alpha=2.0 * rank)
        mesh = self.run.mesh if self.mesh == MeshSpec() else self.mesh
        return dataclasses.replace(
            self.run, init_from=self.init_from or self.run.init_from, lora=lora, mesh=mesh
        )


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 training stopped (loss not finite, disk full, a process lost, SIGTERM); 2 bad input."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    described = {
        name: (inspect.getdoc(function) or "", Options(run=function())) for name, function in RUNS.items()
    }
    options = tyro.extras.overridable_config_cli(
        described, prog="python -m train", description=__doc__, args=arguments
    )
    name = arguments[0]
    from train.initial import SWITCHES, from_checkpoint
    from train.run_folder import CannotWrite
    from train.trainer import Stopped, train

    def start() -> int:
        run = options.changed_run()
        own = RUNS[name]().model
        lost = [field for field, x, _ in differences(vars(run.model), vars(own)) if field not in SWITCHES]
        if run.init_from and lost:
            raise ValueError(
                f"the sizes of the model come from {run.init_from}, so --run.model.{lost[0].replace('_', '-')} would "
                "have no effect; leave it out"
            )
        run = from_checkpoint(run, options.ignore)
        with connected(options, to_json(run)):
            train(run, options.folder or Path("runs") / name)
        return 0

    failures = (FloatingPointError, Stopped, CannotWrite)
    return run_command("python -m train", start, traceback=options.traceback, failures=failures)


if __name__ == "__main__":
    sys.exit(exit_code(main()))
