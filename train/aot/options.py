"""The options of `dsa-jax aot`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tells whether a run fits and where its time would go, without its devices.

    The real step is compiled with its real shardings. Nothing is run, and no TPU is needed (libtpu is:
    pip install 'dsa-jax[tpu]'). A 671B step takes about ten minutes on two cores. For example:
      dsa-jax aot --config deepseek-v3.2 --topology v5p:8x8x16 --mode train --seq-len 4096 --batch 1024 \\
        --mesh data=128,expert=8 --plan
      dsa-jax aot --config deepseek-v3.2 --topology v6e:16x16 --mode decode --seq-len 131072 --batch 256 --suggest
      dsa-jax aot --config DIR/config.json --topology h200:8 --mode train --seq-len 4096 --batch 8 --layers 4

    How to read it: the run fits if `peak` is below the chip's memory. The three times are what arithmetic, main
    memory and network would each need alone, from published rates: look first at the largest.
    """

    config: str = "deepseek-v3.2"
    """deepseek-v3.2, glm-5, glm-5.2 or tiny; or a config.json, or the folder of a checkpoint."""
    topology: str
    """CHIP:SHAPE. v5e:4x4, v5p:8x8x16, v6e:16x16 and tpu7x:4x4x8 count chips (a tpu7x is two devices). h200:8
    simulates eight GPUs on this CPU; memory is then the CPU compiler's plan."""
    mode: Literal["train", "warmup", "prefill", "decode"]
    """train: the sparse stage, which trains everything. warmup: the indexers alone, under dense attention. prefill:
    a prompt into the cache. decode: one more token per row, with --seq-len tokens in the cache."""
    seq_len: int
    """Tokens per row; for decode, tokens in the cache."""
    batch: int
    """Rows per step, on all devices together."""
    mesh: str = ""
    """As in data=16,expert=64,tensor=1,context=1. Other axes default to 1, data to the devices that are left."""
    layers: int | None = None
    """Shrink the model to this many layers, for a quick answer."""
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters, Adam's two moments and the gradients."""
    chunk: int | None = None
    """prefill: tokens per row in one call, the last ones of the prompt. Default: the whole prompt at once."""
    query_block: int = 512
    """Queries per block of attention and index scores: less memory, more steps."""
    plan: bool = False
    """Stop when XLA has planned the memory, before it generates machine code: a tenth of the time. For TPUs. The plan
    is that of the compiled program without the code itself (0.3 GiB for a 671B step)."""
    suggest: bool = False
    """Try meshes instead of --mesh: all that divide the model are ranked by a quick estimate, and the best are
    compiled. For TPUs they are only planned, as with --plan; compile the one you choose."""
    tries: int = 3
    """--suggest: how many meshes to compile."""
    json: Path | None = None
    """Write all results to this file."""
    dump: Path | None = None
    """Keep XLA's dumps of the program in this folder: text, buffers, live ranges."""
    ignore: tuple[str, ...] = ()
    """Keys of config.json that are unknown here and do not change the model."""
    traceback: bool = False
    """On bad input, show where the error arose."""
