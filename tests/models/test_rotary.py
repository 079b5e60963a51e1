from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from pipeinfer_dask.models.families import context_of
from pipeinfer_dask.models.rotary import FIRST, Rotary

HEADS, HEAD_DIM = 2, 16


def config(family: str, **fields: Any) -> Any:
    return AutoConfig.for_model(
        family,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        pad_token_id=None,
        **fields,
    )


@pytest.mark.parametrize(
    ("family", "code", "rotary"),
    [
        ("llama", modeling_llama, "LlamaRotaryEmbedding"),
        ("cohere", modeling_cohere, "CohereRotaryEmbedding"),
        ("glm4", modeling_glm4, "Glm4RotaryEmbedding"),
    ],
)
def test_heads_are_turned_as_the_family_turns_them_however_far_the_text_goes(
    family: str, code: Any, rotary: str
) -> None:
    embedding = getattr(code, rotary)(config(family, max_position_embeddings=4 * FIRST))
    table = Rotary(embedding, (), 4 * FIRST, interleaved=family != "llama")
    heads = torch.randn(3, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    for positions in ([0, 1, FIRST - 1], [FIRST, 5, 7], [4 * FIRST - 1, 0, 3 * FIRST]):
        places = torch.tensor(positions)
        cos, sin = embedding(heads, places[None])
        wanted, _ = code.apply_rotary_pos_emb(*[heads.transpose(0, 1)[None]] * 2, cos, sin)
        got = table.turn(heads.clone(), table.at(places))
        torch.testing.assert_close(got, wanted[0].transpose(0, 1))


def test_a_table_never_reaches_to_where_all_positions_are_encoded_otherwise() -> None:
    factors = {"short_factor": [1.5] * (HEAD_DIM // 2), "long_factor": [3.0] * (HEAD_DIM // 2)}
    switching = FIRST + 10
    settings = config(
        "phi3",
        max_position_embeddings=4 * FIRST,
        original_max_position_embeddings=switching,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": switching,
            **factors,
        },
    )
    embedding = modeling_phi3.Phi3RotaryEmbedding(settings)
    table = Rotary(embedding, (), context_of(settings), interleaved=False)
    places = torch.tensor([3, FIRST])
    cos, _ = embedding(torch.zeros(1), places[None])
    near, _ = table.at(places)
    torch.testing.assert_close(near[:, 0], cos[0])
