"""What `dsa-jax aot` is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Says, without the machine, whether a run fits and where its time goes.

    The real step is compiled for the machine with its real shardings; nothing is run and no TPU is needed (libtpu is:
    pip install 'dsa-jax[tpu]'). A 671B step takes about ten minutes on two cores. For example:
      dsa-jax aot --config deepseek-v3.2 --topology v5p:8x8x16 --mode train --seq-len 4096 --batch 1024 \\
        --mesh data=128,expert=8 --plan
      dsa-jax aot --config deepseek-v3.2 --topology v6e:16x16 --mode decode --seq-len 131072 --batch 256 --suggest
      dsa-jax aot --config DIR/config.json --topology h200:8 --mode train --seq-len 4096 --batch 8 --layers 4

    How to read it: `peak` against the chip's memory says whether it fits. The three times are what arithmetic,
    main memory and network would each need alone, from published rates: the largest is where to look first.
    """

    config: str = "deepseek-v3.2"
    """deepseek-v3.2, glm-5 or tiny; or a config.json, or the folder of a checkpoint."""
    topology: str
    """CHIP:SHAPE. v5e:4x4, v5p:8x8x16, v6e:16x16 and tpu7x:4x4x8 count chips (a tpu7x is two devices); h200:8
    simulates eight GPUs on this CPU: the memory is then the CPU compiler's plan."""
    mode: Literal["train", "warmup", "prefill", "decode"]
    """train: the sparse stage, everything trains. warmup: the indexers alone, under dense attention. prefill: a
    prompt into the cache. decode: one more token for each row, with --seq-len of them in the cache."""
    seq_len: int
    """Tokens of a row; for decode, those that the cache holds."""
    batch: int
    """Rows of a step, over all devices."""
    mesh: str = ""
    """As in data=16,expert=64,tensor=1,context=1. An axis not named is 1; data takes the devices left over."""
    layers: int | None = None
    """Shrink the model to this many layers: to learn quickly."""
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters, and so of Adam's two moments and of the gradients."""
    chunk: int | None = None
    """prefill: tokens of a row in one call, the last of the prompt. Default: the whole prompt at once."""
    query_block: int = 512
    """Queries per block of attention and index scores: less memory, more steps."""
    plan: bool = False
    """Stop when XLA has planned the memory, before it writes machine code: a tenth of the time. For TPUs. The plan
    is that of the compiled program, except that the code itself is missing (0.3 GiB for a 671B step)."""
    suggest: bool = False
    """Try meshes instead of --mesh: all that divide the model are ranked by an estimate, and the best are compiled
    (for TPUs as with --plan: compile the one you choose)."""
    tries: int = 3
    """--suggest: how many meshes to compile."""
    json: Path | None = None
    """Write everything to this file."""
    dump: Path | None = None
    """Keep what XLA writes about the program in this folder: its text, every buffer, what lives when."""
    traceback: bool = False
    """On bad input, show where the error arose."""
