"""What this package takes from JAX's private and experimental modules, outside ``pallas_kernels.hopper``.

Each function imports when it is called, so that importing ``pallas_kernels`` imports none of these modules, and a
JAX release that moves one of them breaks only its caller (``pallas_kernels.dispatch`` then uses ``xla``).
Tried with jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

CUDNN_TESTED_JAX = ("0.11", "0.11")  # 0.11.2, on H100
MEGABLOX_TESTED_JAX = ("0.10", "0.12")  # 0.10.2, 0.11.2 and 0.12.0.1: interpreted and compiled for TPU


def megablox() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """JAX's grouped matrix product on TPU and the product for the gradient of its weights, ``(gmm, tgmm)``.

    ``jax.experimental`` has no stability promise, and no public module has this kernel. The functions underneath
    ``megablox.gmm`` are taken because their gradients can then be given their own tiles.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm


def cudnn_attention(q: Any, k: Any, v: Any, mask: Any, *, scale: float, causal: bool) -> tuple[Any, Any]:
    """Attention by cuDNN: out [B T N H] and the log-sum-exp [B N T] in float32.

    q [B T N X], k [B S N X], v [B S N H]; mask [B 1 T S] booleans or None; causal: query t sees keys 0 .. t.

    ``jax.nn.dot_product_attention`` refuses values that are narrower than the keys, and padding them would have
    cuDNN do a fifth more work.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    kind = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
    return cudnn.dot_product_attention(q, k, v, mask=mask, scale=scale, mask_type=kind, return_residual=True)


def cudnn_attention_gradient(
    q: Any, k: Any, v: Any, mask: Any, lse: Any, out: Any, d_out: Any, *, scale: float, causal: bool
) -> tuple[Any, Any, Any]:
    """Gradients of ``cudnn_attention`` for q, k and v, from its results and the gradient of out.

    The rule behind ``dot_product_attention`` is called itself: differentiating that function would run the forward
    pass again. 0.12 added arguments for a modified score, which is why they are given by name.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    unused = jnp.zeros(0, q.dtype)
    kind = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
    bias = unused if mask is None else cudnn.combine_bias_and_mask(None, mask, q.dtype)
    rule = cudnn._dot_product_attention_bwd_rule
    static = {
        "scale": scale, "seed": 42, "dropout_rate": 0.0, "variadic_args": (mask is not None, False),
        "mask_type": kind, "layout": cudnn.AttentionLayout.BTNH.value, "sliding_window_length": None,
        "score_mod": None, "is_training": True, "cudnn_version": None, "return_residual": False,
    }  # fmt: skip
    names = list(inspect.signature(rule).parameters)
    score_mod_args = ((),) if "score_mod" in names else ()
    residuals = (q, k, v, bias, *[unused] * 6, *score_mod_args, lse, out)
    d_q, d_k, d_v = rule(*[static[name] for name in names[:-2]], residuals, d_out)[:3]
    return d_q, d_k, d_v


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
