"""Where tokens are placed: their slots, the keys that they see, and their positions inside a document."""

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.cache import init_cache, place
from dsa_jax.config import tiny
from dsa_jax.transformer import Transformer

CONFIG = tiny(
    vocab_size=16, d_model=32, d_ff=32, d_expert=16, n_layers=1, n_dense_layers=1, n_mtp_layers=0, n_heads=2,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_n_heads=2,
    index_topk=4, init_std=0.3, dtype="float32", attention="window",
)  # fmt: skip
IDS = [[0, 7, 7, 7, 2, 2, 0, 2, 2]]  # padding, three tokens, two, padding, and a document of its own


def test_documents_start_at_position_0_and_see_nothing_before_themselves():
    found, _ = place(jnp.asarray(IDS), None)
    assert found.valid.tolist() == [[name != 0 for name in IDS[0]]]
    assert found.slots.tolist() == [list(range(9))]
    assert found.positions.tolist() == [[0, 0, 1, 2, 0, 1, 0, 0, 1]]
    assert found.key_start.tolist() == [[0, 1, 1, 1, 4, 4, 0, 7, 7]]
    assert found.key_stop.tolist() == [[0, 2, 3, 4, 5, 6, 0, 8, 9]]


def test_a_document_continues_in_the_next_call_behind_the_last_token():
    cache = init_cache(CONFIG, 1, 16)
    _, cache = place(jnp.asarray([[5, 5, 5, 0, 0]]), cache)
    assert cache.length.tolist() == [3]  # padding behind a token takes no slot
    found, cache = place(jnp.asarray([[5, 5, 9]]), cache)
    assert found.slots.tolist() == [[3, 4, 5]] and cache.length.tolist() == [6]
    assert found.positions.tolist() == [[3, 4, 0]]
    assert found.key_start.tolist() == [[0, 0, 5]] and found.key_stop.tolist() == [[4, 5, 6]]


def test_a_window_holds_index_topk_tokens_with_the_query_itself():
    model, T = Transformer(CONFIG), 10
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 15, (1, T)), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    last = jax.jit(lambda tokens: model.apply(params, tokens)[0][0, -1])
    read = [bool((last(tokens.at[0, i].set(15)) != last(tokens)).any()) for i in range(T)]
    assert read == [i >= T - CONFIG.index_topk for i in range(T)]
