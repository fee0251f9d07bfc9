"""Which form attention runs in, by length, kernel and purpose."""

import dataclasses

from dsa_jax.attention_form import for_training, prefers_mha
from dsa_jax.config import tiny

CONFIG = tiny(
    n_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, index_topk=2048
)


def test_without_a_kernel_the_form_with_fewer_multiplications_runs(monkeypatch):
    monkeypatch.setattr("pallas_kernels.sparse_mla_has_kernel", lambda *_: False)
    assert prefers_mha(CONFIG, 4096, 4096) and not prefers_mha(CONFIG, 32768, 32768)
    assert not prefers_mha(CONFIG, 1, 32768)


def test_with_a_kernel_inference_is_mqa_and_training_is_not_affected(monkeypatch):
    monkeypatch.setattr("pallas_kernels.sparse_mla_has_kernel", lambda *_: True)
    assert not prefers_mha(CONFIG, 4096, 4096)
    assert for_training(CONFIG, 4096).attention_form == "mha"
    assert for_training(CONFIG, 32768).attention_form == "mqa"
    assert for_training(dataclasses.replace(CONFIG, attention_form="mqa"), 4096).attention_form == "mqa"
