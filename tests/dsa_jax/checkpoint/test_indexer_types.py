"""Which layers share an indexer: read from config.json as transformers reads it, and written so that both agree."""

import importlib.util

import pytest

from dsa_jax.checkpoint import from_hf, to_hf
from dsa_jax.config import ModelConfig, glm5, glm52, tiny

GLM = to_hf(tiny(n_layers=8, index_rope_interleaved=True)) | {"num_nextn_predict_layers": 1}
F, S = "full", "shared"
SCHEDULES = {
    "no key": {},
    "freq 2": dict(index_topk_freq=2),
    "freq 4, offset 3 (GLM-5.2)": dict(index_topk_freq=4, index_skip_topk_offset=3),
    "offset 1": dict(index_topk_freq=3, index_skip_topk_offset=1),
    "an offset beyond the layers": dict(index_topk_freq=3, index_skip_topk_offset=20),
    "freq 0": dict(index_topk_freq=0, index_skip_topk_offset=0),
    "pattern": dict(index_topk_pattern="FFSSFSSS"),
    "pattern as a list": dict(index_topk_pattern=[F, S, F, S, S, S, S, F]),
    "pattern before freq": dict(index_topk_pattern="FSSSSSSS", index_topk_freq=1),
    "types": dict(indexer_types=[F, S, S, F, F, S, S, S]),
    "types before pattern and freq": dict(
        indexer_types=[F, F, F, F, S, S, S, S], index_topk_pattern="FSFSFSFS", index_topk_freq=4
    ),
    "all full": dict(indexer_types=[F] * 8, index_topk_freq=4),
}


def types_of(config: ModelConfig) -> list[str]:
    return [F if layer in config.full_layers else S for layer in range(config.n_layers)]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parity
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_read_as_transformers_reads_it(schedule) -> None:
    import transformers

    values = GLM | SCHEDULES[schedule]
    config = from_hf(values)
    expected = transformers.GlmMoeDsaConfig(**values).indexer_types
    assert types_of(config) == expected
    assert transformers.GlmMoeDsaConfig(**to_hf(config)).indexer_types == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_written_is_read_back(schedule) -> None:
    config = from_hf(GLM | SCHEDULES[schedule])
    assert from_hf(to_hf(config)) == config
    types, pattern = (to_hf(config).get(key) for key in ("indexer_types", "index_topk_pattern"))
    if S not in types_of(config):
        assert (config.indexer_types, types, pattern) == (None, None, None)
    else:  # readers of either key
        assert types_of(config) == types == [{"F": F, "S": S}[letter] for letter in pattern]


def test_glm52_is_what_its_release_says() -> None:
    """config.json of zai-org/GLM-5.2: its schedule, and head_dim, which no reader uses."""
    release = to_hf(glm5()) | dict(
        max_position_embeddings=1048576, rope_theta=8e6, index_topk_freq=4, index_skip_topk_offset=3,
        index_topk_pattern=None, index_share_for_mtp_iteration=True, head_dim=192, moe_router_dtype="float32",
    )  # fmt: skip
    assert from_hf(release, mtp_shared_embeddings=True) == glm52()
    assert glm52().full_layers == (0, 1, *range(2, 78, 4))
    # model.safetensors.index.json: 1,506,659,919,872 bytes in bfloat16 but 76 router biases in float32.
    assert 2 * glm52().param_count() + 2 * 76 * 256 == 1_506_659_919_872


def test_a_null_is_an_absent_key() -> None:
    keys = ("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern", "indexer_types")
    absent = dict.fromkeys((*keys, "index_share_for_mtp_iteration"))
    assert from_hf(GLM | absent) == from_hf(GLM)


def test_entries_for_the_mtp_layer_may_follow_if_they_are_full() -> None:
    types = [F, S] * 4
    assert from_hf(GLM | {"indexer_types": [*types, F]}).indexer_types == tuple(types)
    assert from_hf(GLM | {"index_topk_pattern": "FSFSFSFSF"}).indexer_types == tuple(types)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(indexer_types=[S, *[F] * 7]), 'begin with "full".*no selection to share'),
        (dict(index_topk_freq=4, index_skip_topk_offset=0), 'begin with "full"'),
        (dict(index_topk_pattern="SFFFFFFF"), 'begin with "full"'),
        (dict(indexer_types=[F, S]), "each of 8 layers.*got 2"),
        (dict(indexer_types=[F, S] * 5), "at most 1 more.*got 10"),
        (dict(indexer_types=[*[F, S] * 4, S]), "for the MTP layer, got 9 ending in .'shared'"),
        (dict(index_topk_pattern="FFF"), "each of 8 layers.*got 3"),
        (dict(index_topk_pattern="FFFFXFFF"), "index_topk_pattern must be a list.*or a string of F and S"),
        (dict(indexer_types="FFFFFFFF"), "indexer_types must be a list"),
        (dict(indexer_types=[F] * 7 + ["F"]), "indexer_types must be a list"),
        (dict(indexer_types=[F] * 7 + [None]), "indexer_types must be a list"),
        (dict(indexer_types=[F] * 7 + [[F]]), "indexer_types must be a list"),
        (dict(index_topk_freq=2.0), "index_topk_freq must be an integer, got 2.0"),
        (dict(index_skip_topk_offset="3"), "index_skip_topk_offset must be an integer"),
        (dict(index_share_for_mtp_iteration=1), "index_share_for_mtp_iteration must be true or false"),
        (dict(model_type="deepseek_v32", index_topk_freq=2), "only layers of the model_type glm_moe_dsa"),
        (dict(head_dim=48), "head_dim must be 32 or 64"),
    ],
)
def test_what_contradicts_itself_is_refused_with_a_sentence(keys, message) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(GLM | keys)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ((S, F, F, F), 'begin with "full"'),
        ((F, S), "n_layers=4 layers, got 2"),
        ((F, "F", F, F), "got \\['F'\\]"),
    ],
)
def test_a_config_of_ones_own_is_checked_too(types, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(indexer_types=types)


def test_a_model_that_no_class_of_transformers_computes_is_not_written() -> None:
    with pytest.raises(ValueError, match="index_rope_interleaved=True"):
        to_hf(tiny(indexer_types=(F, S, F, S)))
