"""What this package takes from JAX's private and experimental modules, outside ``pallas_kernels.hopper``.

Each function imports when it is called, so that importing ``pallas_kernels`` imports none of these modules, and a
JAX release that moves one of them breaks only its caller (``pallas_kernels.dispatch`` then uses ``xla``).
Tried with jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

import importlib
from collections.abc import Callable
from typing import Any

MEGABLOX_TESTED_JAX = ("0.10", "0.12")  # 0.10.2, 0.11.2 and 0.12.0.1: interpreted and compiled for TPU


def megablox() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """JAX's grouped matrix product on TPU and the product for the gradient of its weights, ``(gmm, tgmm)``.

    ``jax.experimental`` has no stability promise, and no public module has this kernel. The functions underneath
    ``megablox.gmm`` are taken because their gradients can then be given their own tiles.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm


def cudnn_causal_attention(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Causal attention [B T N H] by cuDNN; q and k [B T N X], v [B T N H].

    ``jax.nn.dot_product_attention`` refuses values that are narrower than the keys, and padding them would have
    cuDNN do a fifth more work.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.CAUSAL)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What MLIR and Mosaic raise when a kernel cannot be lowered; they share no base class below Exception."""
    errors = []
    for module, name in (
        ("jax.extend.mlir.ir", "MLIRError"),
        ("jax._src.pallas.mosaic.error_handling", "MosaicError"),
    ):
        try:
            errors.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):  # in a release that moved it this error is not recognised
            continue
    return tuple(errors)
