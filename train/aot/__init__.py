"""`dsa-jax aot` (`python -m train.aot`): does a run fit, and where does its time go? Asked without the machine.

The real step is compiled with its real shardings: for a TPU topology by libtpu, with no TPU; for GPUs as many CPU
devices are simulated. Nothing is run. Memory is the compiler's own plan; times are estimates from published rates.

Exit codes: 0 it fits (with --suggest: some mesh does); 1 it does not; 2 bad input, said in one line.
"""

from train.aot.command import main

__all__ = ["main"]
