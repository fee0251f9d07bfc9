"""Architecture and run options of a DeepSeek-V3.2 style model (MLA + DSA indexer + MoE + one MTP layer).

Dimension key, used in every einsum string, shape annotation and docstring of this package:

    B batch            D d_model            I index_n_heads    E n_routed_experts
    T query position   N n_heads            J index_head_dim   A n_activated_experts
    S key position     P qk_nope_head_dim   K index_topk       F d_expert or d_ff
    L layer            R qk_rope_head_dim   Q q_lora_rank      V vocab_size
                       H v_head_dim         C kv_lora_rank (the latent)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

_MAY_BE_ZERO = ("n_dense_layers", "n_mtp_layers", "mscale", "mscale_all_dim")


def _check_values(config: YarnConfig | Fp8Config | ModelConfig) -> None:
    """Raises ValueError on a value that does not fit its field: sizes are positive, Literals list the options."""
    for name, hint in get_type_hints(type(config)).items():
        value, owner = getattr(config, name), type(config).__name__
        if get_origin(hint) is Literal and value not in get_args(hint):
            options = ", ".join(repr(option) for option in get_args(hint))
            raise ValueError(f"{owner}.{name} must be one of {options}, got {value!r}")
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"{owner}.{name} must be True or False, got {value!r}")
        if hint == (float | None) and value is not None:
            hint = float
        if hint is int or hint is float:
            number = (int,) if hint is int else (int, float)
            least = "at least 0" if name in _MAY_BE_ZERO else "positive"
            if isinstance(value, bool) or not isinstance(value, number) or not abs(value) < math.inf:
                raise ValueError(f"{owner}.{name} must be a finite {hint.__name__}, got {value!r}")
            if isinstance(value, int) and hint is int and abs(value) >= 2**31:
                raise ValueError(f"{owner}.{name} must be below 2**31, got one of {value.bit_length()} bits")
            if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise ValueError(f"{owner}.{name} must be {least}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) as DeepSeek uses it.

    factor: the extended context over the original one. original_seq_len: the original context, in tokens.
    beta_fast, beta_slow: a pair that makes more rotations than beta_fast in original_seq_len keeps its frequency,
    one that makes fewer than beta_slow has it divided by factor; frequencies in between are interpolated.
    mscale, mscale_all_dim: attention temperatures; 0 stands for an absent key. With t(m) = 0.1 m ln(factor) + 1,
    the softmax scale is multiplied by t(mscale_all_dim)^2, and cos and sin of the rotation by
    t(mscale) / t(mscale_all_dim), or by t(1) when either key is absent (transformers, modeling_rope_utils.py).
    attention_factor: multiplies cos and sin in place of that quotient.
    Raises ValueError when two values contradict each other.
    """

    factor: float
    original_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_values(self)
        if self.factor < 1:
            raise ValueError(
                f"YarnConfig.factor must be at least 1 (yarn=None for no YaRN), got {self.factor}"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast must not be below beta_slow, got {self.beta_fast} < {self.beta_slow}"
            )

    def temperature(self, mscale: float) -> float:
        """t(mscale) = 0.1 mscale ln(factor) + 1; 1 when the context is not extended or mscale is 0."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """What cos and sin of the rotation are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return self.temperature(1.0)


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """How stored weights are quantised: float8_e4m3fn with one float32 scale per block.

    block: the (out, in) size of the blocks of an [out, in] matrix; only (128, 128) is supported.
    scale_fmt: "ue8m0" rounds every scale up to a power of two (V3.2), None keeps amax / 448 (V3).
    """

    block: tuple[int, int] = (128, 128)
    scale_fmt: Literal["ue8m0", None] = "ue8m0"

    def __post_init__(self) -> None:
        _check_values(self)
        if self.block != (128, 128):
            raise ValueError(f"Fp8Config.block must be (128, 128), the only size supported, got {self.block}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model: its architecture, then from ``attention`` on how it runs. Sizes count elements.

    max_seq_len: in tokens.
    norm_eps, latent_norm_eps, index_norm_eps: added to the variance in the RMSNorms of the residual stream, in q_norm
      and kv_norm, and in the indexer's LayerNorm.
    mtp_hidden: whether the MTP layer reads the hidden state after or before the final norm.
    mtp_shared_embeddings: whether it uses the model's embedding and head; the released checkpoint has its own.
    mtp_reuses_selection: whether it may draft further tokens with the keys that it selected for the first one
      (``Transformer.mtp_logits``; GLM-5.2's index_share_for_mtp_iteration).
    indexer_types: per main layer "full", or "shared" for a layer without an indexer, which reads the keys that the last
      full layer before it selected (GLM-5.2's IndexShare, arXiv 2603.12201). None: all are full. The MTP layer is.
    fp8: how stored weights are quantised; it does not change the arithmetic.
    attention: "window" reads the most recent index_topk keys, as a control for the indexer's selection.
    attention_form: expanded or absorbed heads; "auto" picks the faster one (``attention_form.prefers_mha``).
    index_fp8, kv_fp8: round index queries and keys, or latents, to FP8 as the released inference code does.
    index_loss: the model also returns the index loss (L_I), of its dense or its sparse attention.
    implementation: of the kernels; None picks the best available (``pallas_kernels.dispatch``).
    query_block: queries per block of selection, absorbed attention and index loss; it bounds memory.
    remat: "layer" recomputes each layer in the backward pass.
    Raises ValueError when two values contradict each other.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_dense_layers: int
    n_heads: int
    d_ff: int
    d_expert: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    route_scale: float
    max_seq_len: int
    norm_topk_prob: bool = True
    norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    index_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    index_rope_interleaved: bool = False
    n_mtp_layers: int = 0
    mtp_shared_embeddings: bool = False
    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    mtp_reuses_selection: bool = False
    indexer_types: tuple[str, ...] | None = None
    init_std: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    fp8: Fp8Config | None = None

    attention: Literal["sparse", "dense", "window"] = "sparse"
    attention_form: Literal["auto", "mha", "mqa"] = "auto"
    index_fp8: bool = False
    index_loss: bool = False
    kv_fp8: bool = False
    implementation: Literal[None, "xla", "mosaic_tpu", "mosaic_gpu"] = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    query_block: int = 512
    remat: Literal["none", "layer"] = "none"

    def __post_init__(self) -> None:
        _check_values(self)
        if self.n_dense_layers > self.n_layers:
            raise ValueError(
                f"n_dense_layers must not exceed n_layers, got {self.n_dense_layers} > {self.n_layers}"
            )
        if self.n_mtp_layers > 1:
            raise ValueError(f"n_mtp_layers must be 0 or 1, got {self.n_mtp_layers}")
        self._check_experts()
        self._check_indexers()
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim must be even (RoPE rotates pairs), got {self.qk_rope_head_dim}"
            )
        if self.qk_rope_head_dim > self.index_head_dim:
            raise ValueError(
                f"index_head_dim must not be below qk_rope_head_dim, got index_head_dim={self.index_head_dim} < "
                f"qk_rope_head_dim={self.qk_rope_head_dim}"
            )
        if self.index_fp8 and (self.index_head_dim & (self.index_head_dim - 1) or self.index_head_dim < 128):
            raise ValueError(
                "index_fp8=True needs index_head_dim to be a power of two (Hadamard) and a multiple of 128 (one scale "
                f"each), got {self.index_head_dim}"
            )
        if self.kv_fp8 and self.kv_lora_rank % 128:
            raise ValueError(
                f"kv_fp8=True needs kv_lora_rank to be a multiple of 128, got {self.kv_lora_rank}"
            )
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids must be a tuple of token ids, got {self.eos_token_ids!r}")
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not (type(token) is int and 0 <= token < self.vocab_size):
                raise ValueError(
                    f"bos, eos and pad token ids must lie in [0, vocab_size={self.vocab_size}), got {token!r}"
                )

    def _check_experts(self) -> None:
        experts, groups, limited = self.n_routed_experts, self.n_expert_groups, self.n_limited_groups
        if experts % groups:
            raise ValueError(
                f"n_routed_experts must be a multiple of n_expert_groups, got {experts}, {groups}"
            )
        if limited > groups:
            raise ValueError(f"n_limited_groups must not exceed n_expert_groups, got {limited} > {groups}")
        if groups > 1 and experts // groups < 2:
            raise ValueError(
                f"a group is scored by its two best experts, so n_expert_groups={groups} needs at least "
                f"{2 * groups} experts, got n_routed_experts={experts}"
            )
        if self.n_activated_experts > limited * (experts // groups):
            raise ValueError(
                f"n_activated_experts must not exceed the experts in n_limited_groups={limited} groups of "
                f"{experts // groups}, got {self.n_activated_experts} > {limited * (experts // groups)}"
            )

    def _check_indexers(self) -> None:
        if (types := self.indexer_types) is None:
            return
        if not isinstance(types, tuple) or (wrong := set(types) - {"full", "shared"}):
            shown = types if not isinstance(types, tuple) else sorted(map(str, wrong))
            raise ValueError(f'indexer_types must be a tuple of "full" and "shared", or None, got {shown!r}')
        if len(types) != self.n_layers:
            raise ValueError(
                f"indexer_types must have one entry for each of n_layers={self.n_layers} layers, got {len(types)}"
            )
        if types[0] != "full":
            raise ValueError(
                'indexer_types must begin with "full", got "shared": before the first layer there is no selection '
                "to share"
            )

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The main layers that have an indexer; the others read what the last one before them selected."""
        types = self.indexer_types or ("full",) * self.n_layers
        return tuple(layer for layer, kind in enumerate(types) if kind == "full")

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, P + R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def n_moe_layers(self) -> int:
        """Main layers with experts; the MTP layer is not counted."""
        return self.n_layers - self.n_dense_layers

    @property
    def softmax_scale(self) -> float:
        """(P + R)^-0.5, times YaRN's squared temperature (DeepSeek inference/model.py, MLA.softmax_scale)."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is None:
            return scale
        return scale * self.yarn.temperature(self.yarn.mscale_all_dim) ** 2

    def param_count(self) -> int:
        """Elements of the parameter tree, with the MTP layer and the router bias, without FP8 scales."""
        width, heads, vocab = self.d_model, self.n_heads, self.vocab_size * self.d_model
        indexer = self.index_n_heads * self.index_head_dim * self.q_lora_rank
        indexer += width * (self.index_head_dim + self.index_n_heads) + 2 * self.index_head_dim
        attention = self.q_lora_rank * (width + 1 + heads * self.qk_head_dim)
        attention += width * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        attention += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention += heads * self.v_head_dim * width
        dense = attention + 2 * width + 3 * width * self.d_ff
        moe = attention + 2 * width + (width + 1) * self.n_routed_experts
        moe += 3 * width * self.d_expert * (self.n_routed_experts + self.n_shared_experts)
        mtp = indexer + moe + 3 * width + 2 * width * width + (0 if self.mtp_shared_embeddings else 2 * vocab)
        main = 2 * vocab + width + self.n_dense_layers * dense + self.n_moe_layers * moe
        main += len(self.full_layers) * indexer
        return main + self.n_mtp_layers * mtp


def deepseek_v32(**changes: Any) -> ModelConfig:
    """DeepSeek-V3.2 (671B) as released; `changes` replace fields."""
    config = ModelConfig(
        vocab_size=129280, d_model=7168, n_layers=61, n_dense_layers=3, n_heads=128, d_ff=18432,
        d_expert=2048, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, index_n_heads=64, index_head_dim=128, index_topk=2048, n_routed_experts=256,
        n_shared_experts=1, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4, route_scale=2.5,
        max_seq_len=163840, yarn=YarnConfig(factor=40.0, original_seq_len=4096), n_mtp_layers=1,
        bos_token_id=0, eos_token_ids=(1,), fp8=Fp8Config(),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def glm5(**changes: Any) -> ModelConfig:
    """GLM-5 and GLM-5.1 (bfloat16 release): one expert group, interleaved indexer RoPE, no YaRN."""
    config = ModelConfig(
        vocab_size=154880, d_model=6144, n_layers=78, n_dense_layers=3, n_heads=64, d_ff=12288, d_expert=2048,
        q_lora_rank=2048, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        index_n_heads=32, index_head_dim=128, index_topk=2048, n_routed_experts=256, n_shared_experts=1,
        n_activated_experts=8, n_expert_groups=1, n_limited_groups=1, route_scale=2.5, max_seq_len=202752,
        norm_eps=1e-5, latent_norm_eps=1e-6, rope_theta=1e6, index_rope_interleaved=True, n_mtp_layers=1,
        eos_token_ids=(154820, 154827, 154829), pad_token_id=154820,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def glm52(**changes: Any) -> ModelConfig:
    """GLM-5.2 (bfloat16 release): GLM-5 with a longer context, and an indexer in 21 of its 78 layers."""
    config = glm5(
        max_seq_len=1048576, rope_theta=8e6, mtp_shared_embeddings=True, mtp_reuses_selection=True,
        indexer_types=("full", "full", *("full", "shared", "shared", "shared") * 19),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def tiny(**changes: Any) -> ModelConfig:
    """A small V3.2 with all its parts: 4 layers of width 256, sparse from the 17th token on."""
    sizes = dict(
        vocab_size=512, d_model=256, n_layers=4, n_dense_layers=1, n_heads=4, d_ff=512, d_expert=128,
        q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=32,
        index_n_heads=32, index_topk=16, n_routed_experts=8, n_activated_experts=3, n_expert_groups=4,
        n_limited_groups=2,
    )  # fmt: skip
    return deepseek_v32(**(sizes | changes))
