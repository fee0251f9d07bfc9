"""Each command of the training side explains itself: `--help` prints its options and ends with exit code 0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMANDS = {  # arguments of python -> what its help must name
    "-m train": "nano_cpu",
    "-m train nano_cpu": "--folder",
    "-m train.data.prepare": "--vocab-size",
    "-m train.export": "--max-shard-bytes",
    "-m train.reports": "RUN_DIR",
    "-m train.measure.throughput": "--lengths",
    "-m train.measure.scaling": "--rows",
    "-m train.measure.ablations": "--variant-steps",
    "-m train.aot": "--topology",
    "-m pallas_kernels.bench": "--json",
}


@pytest.mark.parametrize(("command", "option"), COMMANDS.items(), ids=COMMANDS)
def test_help(command, option):
    done = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        cwd=REPOSITORY, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert option in done.stdout and not done.stderr, done.stderr[-4000:]
