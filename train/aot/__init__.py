"""`dsa-jax aot` (`python -m train.aot`): does a run fit, and where would its time go? Needs none of its devices.

The real step is compiled with its real shardings: by libtpu for a TPU topology, on as many simulated CPU devices for
GPUs. Nothing is run. Memory is the compiler's own plan; times are estimates from published rates.

Exit codes: 0 it fits (with --suggest: at least one mesh does); 1 it does not; 2 bad input, said in one line.
"""

from train.aot.command import main

__all__ = ["main"]
