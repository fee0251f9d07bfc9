"""`python -m tests.train.worker small ...` is `python -m train ...` with an additional run for tests."""

import dataclasses
import sys

from tests.train.small import CONFIG, OPTIONS, T
from train.__main__ import main
from train.config import Run, Source, sparse
from train.distributed import exit_code
from train.runs import RUNS


def small() -> Run:
    """20 steps that train everything, on batches that eight devices can split."""
    return Run(
        model=dataclasses.replace(CONFIG, n_layers=1, n_dense_layers=0, n_mtp_layers=0),
        stages=(sparse(20, lr=3e-3, index_lr=3e-3, lr_warmup=2, bias_step=0.01),),
        data=(Source(kind="associative_recall", options=OPTIONS),),
        batch=8, seq_len=T, checkpoint_every=4, log_every=1, eval_batches=0,
    )  # fmt: skip


if __name__ == "__main__":
    RUNS["small"] = small
    sys.exit(exit_code(main()))
