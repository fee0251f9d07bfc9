"""The operations of DeepSeek Sparse Attention as pure functions of arrays.

    index_scores   I[t, s] = sum_i w[t, i] relu(q[t, i] . k[s])        the lightning indexer
    select_topk    the index_topk best keys of each query               the fine-grained selector
    sparse_mla     attention of absorbed queries over these latents     MLA in its MQA form
    masked_mha     attention of expanded heads, dense or masked         MLA in its MHA form
    index_kl       KL between attention and index scores, its gradient  how the indexer is trained
    grouped_matmul rows sorted by expert, each times its matrix         the routed experts

Each operation is a package: ``__init__`` holds the public function (its contract, its argument checks),
``xla`` the portable implementation, ``mosaic_gpu`` and ``mosaic_tpu`` the kernels. With the keyword
``implementation``, a named one runs or raises; ``None`` picks the best available one (see ``dispatch``).

Dimension key, the same letters in docstrings, annotations and einsum strings:

    B batch          N n_heads             I index_n_heads
    T query          C kv_lora_rank        J index_head_dim
    S key            R qk_rope_head_dim    K index_topk
    E group          P qk_nope_head_dim    H v_head_dim
    M row            X width of the rows   Y width of their products

Visible keys are one interval per query: query ``t`` may see key ``s`` if and only if
``key_start[b, t] <= s < key_stop[b, t]``. That covers causal masks, packed documents, padding on either
side and caches, and lets a kernel skip whole blocks. A query with an empty interval has no key.
In ``topk_indices`` a missing key is ``-1``, and nothing else means missing.
"""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.index_kl import index_kl_dense, index_kl_selected
from pallas_kernels.index_scores import index_scores, index_scores_has_kernel
from pallas_kernels.masked_mha import masked_mha
from pallas_kernels.select_topk import select_topk
from pallas_kernels.sparse_mla import sparse_mla, sparse_mla_has_kernel

__all__ = [
    "grouped_matmul",
    "index_kl_dense",
    "index_kl_selected",
    "index_scores",
    "index_scores_has_kernel",
    "masked_mha",
    "select_topk",
    "sparse_mla",
    "sparse_mla_has_kernel",
]
