"""A mistake is told in one line, before a cluster is started or a worker loads anything."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from distributed import Client
from transformers import GenerationConfig

import pipeinfer_dask as pi
from pipeinfer_dask.engine import EngineClosedError
from pipeinfer_dask.policies import PipeInfer
from tests.clusters import client_of
from tests.engine.pairs import LAYERS, PROMPT, Pair
from tests.test_cli import MISTAKES
from tests.tiny import make_tiny

Break = Callable[[Path], object]


@pytest.fixture
def nothing_starts() -> Iterator[None]:
    """Fail the test if it starts a thread or a process."""
    children = set(psutil.Process().children())
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("pipeinfer")]
    assert set(psutil.Process().children()) <= children


def edit(name: str, **fields: Any) -> Break:
    def change(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def cut(name: str, length: int) -> Break:
    def change(model: Path) -> None:
        file = model / name
        file.write_bytes(file.read_bytes()[:length])

    return change


def delete(pattern: str) -> Break:
    def change(model: Path) -> None:
        for file in model.glob(pattern):
            file.unlink()

    return change


def drop_last_layer(model: Path) -> None:
    make_tiny(model / "smaller", "llama", layers=LAYERS - 1, seed=0)
    (model / "smaller" / "model.safetensors").replace(model / "model.safetensors")


BROKEN: dict[str, tuple[Break, type[Exception], str]] = {
    "gone": (shutil.rmtree, FileNotFoundError, "there is no directory .*model.*: give a model's"),
    "empty": (
        delete("*"),
        FileNotFoundError,
        "is no model: it has no config.json",
    ),
    "without weights": (delete("model.safetensors"), FileNotFoundError, "safetensors"),
    "truncated weights": (cut("model.safetensors", 30_000), ValueError, "model.safetensors"),
    "truncated header": (cut("model.safetensors", 100), ValueError, "model.safetensors"),
    "no weights at all": (cut("model.safetensors", 0), ValueError, "model.safetensors"),
    "truncated config": (cut("config.json", 50), ValueError, "config.json is not valid JSON"),
    "no model type": (
        lambda model: (model / "config.json").write_text("{}"),
        ValueError,
        "model_type",
    ),
    "other family": (edit("config.json", model_type="t5x"), ValueError, "the t5x family"),
    "recurrent": (
        edit("config.json", model_type="mamba"),
        ValueError,
        "mamba models are recurrent",
    ),
    "encoder and decoder": (
        edit("config.json", model_type="t5", is_encoder_decoder=True),
        ValueError,
        "t5 models are encoder-decoders",
    ),
    "unknown family": (edit("config.json", model_type="nonsense"), ValueError, "nonsense"),
    "a list of families": (edit("config.json", model_type=["llama"]), ValueError, "model_type"),
    "quantised": (
        edit("config.json", quantization_config={"quant_method": "gptq"}),
        ValueError,
        r"quantised \(gptq\)",
    ),
    "unknown activation": (
        edit("config.json", hidden_act="foo"),
        ValueError,
        r"config\.json: expected hidden_act as the name of an activation, .* got 'foo'",
    ),
    "no context": (edit("config.json", max_position_embeddings=0), ValueError, "config.json"),
    "no layers": (edit("config.json", num_hidden_layers=0), ValueError, "model"),
    "heads of text": (
        edit("config.json", num_attention_heads="many"),
        ValueError,
        r"config\.json is wrong for a llama model: .*'num_attention_heads' .*: download it again$",
    ),
    "a list as config": (
        lambda model: (model / "config.json").write_text("[1, 2]"),
        ValueError,
        "must hold a JSON object, not a list",
    ),
    "a config that is no text": (
        lambda model: (model / "config.json").write_bytes(b"\xff\xfe\x00"),
        ValueError,
        "config.json is not valid JSON",
    ),
    "weights of another kind": (
        lambda model: (model / "model.safetensors").write_bytes(b"PK\x03\x04" * 99),
        ValueError,
        "model.safetensors is truncated or no safetensors file",
    ),
    "an index of nothing": (
        lambda model: (model / "model.safetensors.index.json").write_text("{}"),
        ValueError,
        "is no index of safetensors files",
    ),
    "an index of files that are not there": (
        lambda model: (model / "model.safetensors.index.json").write_text(
            '{"weight_map": {"model.norm.weight": "gone.safetensors"}}'
        ),
        FileNotFoundError,
        r"gone\.safetensors is not there, which holds model\.norm\.weight",
    ),
    "pickled weights": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        FileNotFoundError,
        r"pytorch_model\.bin is pickled, and reading it could run any code",
    ),
    "other width": (edit("config.json", hidden_size=64), ValueError, "shape"),
    "missing tensors": (drop_last_layer, ValueError, r"lacks the tensor model.layers.3\."),
    "without tokenizer": (
        delete("tokenizer*"),
        FileNotFoundError,
        "has no tokenizer: expected one of tokenizer.json",
    ),
    "broken tokenizer": (
        cut("tokenizer.json", 100),
        ValueError,
        "the tokenizer in .* can't be loaded: .*: download its files again, or",
    ),
}


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize(("change", "kind", "match"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_model_is_refused(
    pair: Pair,
    tmp_path: Path,
    nothing_starts: None,
    role: str,
    change: Break,
    kind: type[Exception],
    match: str,
) -> None:
    broken = shutil.copytree(pair.target, tmp_path / "model")
    change(broken)
    target, draft = (broken, pair.draft) if role == "target" else (pair.target, broken)
    with pytest.raises(kind, match=match) as caught:
        pi.Engine.from_pretrained(target, draft)
    assert len(str(caught.value).splitlines()) == 1
    assert str(broken) in str(caught.value)


def test_a_file_is_no_model(pair: Pair, nothing_starts: None) -> None:
    with pytest.raises(ValueError, match=r"expected the directory of a model, but .* is a file"):
        pi.Engine.from_pretrained(pair.target / "config.json")


def test_what_is_neither_path_nor_name_is_no_model(nothing_starts: None) -> None:
    with pytest.raises(ValueError, match="expected a model's directory or hub name, got None"):
        pi.Engine.from_pretrained(None)  # type: ignore[arg-type]


def test_a_pair_in_one_is_refused_with_the_way_to_give_it(nothing_starts: None) -> None:
    with pytest.raises(ValueError, match=r"from_pretrained\(pair\.target, draft=pair\.draft\)"):
        pi.Engine.from_pretrained(pi.demo_pair())  # type: ignore[arg-type]


SLIPS: dict[str, tuple[dict[str, Any], str]] = {
    "a slip": ({"stage": 2}, "there is no setting 'stage': did you mean 'stages'"),
    "no such thing": ({"banana": 2}, "no setting 'banana': expected one of target, draft, cl"),
}


@pytest.mark.parametrize("given", [(), ("model",)])
@pytest.mark.parametrize(("options", "match"), SLIPS.values(), ids=SLIPS.keys())
def test_an_option_that_there_is_not_is_told_with_the_nearest_one(
    nothing_starts: None, given: tuple[str, ...], options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        pi.Engine.from_pretrained(*given, **options)
    with pytest.raises(ValueError, match="no setting 'acceptence': did you mean 'acceptance'"):
        pi.Emulation.open(pi.Costs.even(1), acceptence=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("given", [{}, {"target": "model"}, {"target": "model", "draft": "other"}])
def test_an_engine_that_is_made_directly_names_the_way_to_open_one(given: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=r"expected Engine\.from_pretrained\(target, draft="):
        pi.Engine(**given)


def test_a_closed_engine_has_no_dashboard(pair: Pair) -> None:
    with pi.Engine.from_pretrained(pair.target, in_process=True) as engine:
        pass
    with pytest.raises(EngineClosedError, match="this engine is closed: open another one"):
        engine.dashboard()


def test_settings_that_are_not_applied_are_told(pair: Pair, tmp_path: Path) -> None:
    model = shutil.copytree(pair.target, tmp_path / "model")
    (model / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 1.1, "num_beams": 1, "forced_eos_token_id": 7})
    )
    with (
        pytest.warns(UserWarning, match=r"asks for forced_eos_token_id=7 in .* not applied"),
        pi.Engine.from_pretrained(model, in_process=True, stages=1),
    ):
        pass


def test_vocabularies_of_different_tokens_are_refused(
    pair: Pair, tmp_path: Path, nothing_starts: None
) -> None:
    draft = make_tiny(tmp_path, "llama", layers=1, seed=0, vocab_size=300)
    with pytest.raises(ValueError, match=r"vocabularies .* differ: token 287 is") as caught:
        pi.Engine.from_pretrained(pair.target, draft)
    assert "use a draft of the target's family" in str(caught.value)


def test_vocabularies_that_differ_in_one_token_are_refused(
    pair: Pair, tmp_path: Path, nothing_starts: None
) -> None:
    draft = shutil.copytree(pair.draft, tmp_path / "draft")
    tokenizer = draft / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<270>", "<other>"))
    with pytest.raises(ValueError, match=r"vocabularies of target and draft differ: token 270 "):
        pi.Engine.from_pretrained(pair.target, draft)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "more stages than layers": ({"stages": 5}, "5 stages .* model has 4: use at most 4 stages"),
    "more stages than memory": ({"stages": 10**14}, "model has 4: use at most 4 stages"),
    "more stages than memory to share out": (
        {"stages": 10**14, "layer_split": "auto"},
        "model has 4: use at most 4 stages",
    ),
    "no stages": ({"stages": 0}, "expected stages as a whole number of at least 1, got 0"),
    "negative stages": ({"stages": -1}, "stages as a whole number of at least 1, got -1"),
    "half a stage": ({"stages": 1.5}, r"stages as a whole number of at least 1, got 1\.5"),
    "yes as stages": ({"stages": True}, "stages as a whole number of at least 1, got True"),
    "negative share": ({"layer_split": [2, -1, 1]}, "weights above 0 .* got -1"),
    "share of nan": ({"layer_split": [1, float("nan")]}, "finite weights above 0 .* got nan"),
    "endless share": ({"layer_split": [1, float("inf")]}, "finite weights above 0 .* got inf"),
    "share of text": ({"layer_split": [1, "2"]}, "made of numbers, not of '2'"),
    "no share": ({"layer_split": [0, 0]}, "weights above 0 .* got 0: use fewer stages"),
    "empty split": ({"layer_split": []}, r"layer_split as numbers, one a stage, .* got \[\]"),
    "one number as split": (
        {"layer_split": 3},
        "layer_split as numbers, one a stage, or as 'auto', got 3",
    ),
    "text as split": ({"layer_split": "2,1"}, "or as 'auto', got '2,1'"),
    "another word as split": ({"layer_split": "foo"}, "or as 'auto', got 'foo'"),
    "an array as split": (
        {"layer_split": np.ones(2)},
        r"numbers, one a stage, or as 'auto', got array\(\[1\., 1\.\]\)",
    ),
    "bytes as split": ({"layer_split": b"auto"}, "or as 'auto', got b'auto'"),
    "weights of no kind": ({"weights": 16}, "weights to be one of 'auto', 'fp16', 'fp32', got 16"),
    "a number as progress": ({"progress": 3}, "progress as a callable, True, False or None, got 3"),
    "a slip of ngram": ({"draft": "ngrams"}, "no draft 'ngrams': did you mean 'ngram'"),
    "no client": ({"client": "tcp://127.0.0.1:1"}, r"a distributed\.Client, got 'tcp://"),
    "a device that there is not": ({"devices": "tpu"}, "'tpu'"),
    "a dtype that there is not": ({"dtype": "int4"}, "'int4'"),
    "too many shares": ({"layer_split": [1] * 5}, "5 stages .* model has 4"),
    "a stage of no share": ({"layer_split": [1, 0]}, "weights above 0 .* got 0: use fewer stages"),
    "threads with spares": (
        {"in_process": True, "spares": 1},
        "expected spares with workers, got 1 and in_process=True: leave one out",
    ),
    "a crowd": ({"max_concurrent": 10**9}, "max_concurrent .* from 1 to 1024, got 1000000000"),
    "shares for other stages": (
        {"stages": 3, "layer_split": [1, 1]},
        r"one weight for each of the 3 stages, not \[1, 1\]",
    ),
}


@pytest.mark.parametrize(("options", "match"), OPTIONS.values(), ids=OPTIONS.keys())
def test_stages_that_do_not_fit_are_refused(
    pair: Pair, nothing_starts: None, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        pi.Engine.from_pretrained(pair.target, **{"draft": pair.draft} | options)
    assert len(str(caught.value).splitlines()) == 1


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown strategy": (
        {"strategy": "magic"},
        "unknown strategy 'magic': choose one of iterative, speculative, pipeinfer",
    ),
    "strategy of another type": ({"strategy": 3}, "unknown strategy 3"),
    "unknown knob": ({"strategy": "iterative", "k": 3}, "'iterative' has no knob 'k'"),
    "knob out of range": ({"ramp": 0}, "expected ramp as a whole number from 1 to 256, got 0"),
    "more choices than are of use": ({"width": 4097}, "width .* from 1 to 256, got 4097"),
    "knob of text": ({"floor": "high"}, "floor as a number from 0 to 1, got 'high'"),
    "policy and knobs": ({"strategy": PipeInfer(), "split": 1}, "expected knobs or a policy"),
    "empty text": ({"prompt": ""}, "a prompt of at least one token, got an empty one"),
    "no tokens": ({"prompt": []}, "a prompt of at least one token, got an empty one"),
    "no prompt": ({"prompt": None}, "a prompt as text or token ids, got None"),
    "bytes": ({"prompt": b"def"}, "a prompt as text or token ids, got b'def'"),
    "a class": ({"prompt": str}, "a prompt as text or token ids, got <class 'str'>"),
    "one token": ({"prompt": torch.tensor(3)}, r"a prompt as text or token ids, got tensor\(3\)"),
    "half a token": ({"prompt": [1, 1.5]}, r"token ids as whole numbers, got 1\.5"),
    "yes as a token": ({"prompt": [1, True]}, "token ids as whole numbers, got True"),
    "half a letter": (
        {"prompt": "a\ud800"},
        "a prompt that is valid Unicode text, .* surrogates.*: save it as UTF-8",
    ),
    "a token of text": ({"prompt": [1, "2"]}, "token ids as whole numbers, got '2': encode text"),
    "a list of prompts": ({"prompt": ["a", "b"]}, "token ids as whole numbers, got 'a': encode"),
    "a lone number": ({"prompt": np.array(1)}, r"a prompt as text or token ids, got array\(1\)"),
    "a token beyond 64 bits": ({"prompt": [2**70]}, "token ids from 0 to 287, got 1180"),
    "a set of tokens": ({"prompt": {1: 2}}, "a prompt as text or token ids, got {1: 2}"),
    "unknown token": ({"prompt": [1, 288]}, "token ids from 0 to 287, got 288"),
    "negative token": ({"prompt": [1, -1]}, "token ids from 0 to 287, got -1"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens of at least 1, got 0"),
    "less than none": ({"max_new_tokens": -5}, "max_new_tokens of at least 1, got -5"),
    "half a new token": ({"max_new_tokens": 1.5}, r"as a whole number, got 1\.5"),
    "yes as new tokens": ({"max_new_tokens": True}, "as a whole number, got True"),
    "too many new tokens": (
        {"prompt": [1] * 12, "max_new_tokens": 501},
        r"context of 512, got 12 \+ 501: shorten the prompt or ask for fewer tokens",
    ),
    "beams": ({"num_beams": 4}, "num_beams=4 is not supported: leave it out"),
    "beams in a dict": ({"generation_config": {"num_beams": 4}}, "num_beams=4 is not supported"),
    "guidance": (
        {"generation_config": GenerationConfig(guidance_scale=1.5)},
        r"guidance_scale=1\.5 is not supported",
    ),
    "several texts": ({"num_return_sequences": 2}, "start several generations, each with a seed"),
    "length in all": ({"max_length": 99}, "max_length=99 is not supported: use max_new_tokens"),
    "no such field": ({"generation_config": {"temp": 1}}, "fields of GenerationConfig, got 'temp'"),
    "no configuration": ({"generation_config": 3}, "as a GenerationConfig or a dict, got 3"),
    "a policy that is not made yet": (
        {"strategy": PipeInfer},
        r"got the class PipeInfer: give an instance, PipeInfer\(\)",
    ),
    "neither setting nor knob": (
        {"banana": 1},
        "a field of GenerationConfig, such as temperature, or a knob of a strategy .*micro_batch",
    ),
    "a knob's slip": ({"micro_bach": 1}, "no setting 'micro_bach': did you mean 'micro_batch'"),
    "more logprobs than tokens": ({"logprobs": 289}, "expected logprobs from 0 to 288, .* got 289"),
    "large seed that is not used": ({"seed": 2**63}, r"expected seed from 0 to 2\*\*63 - 1, got 9"),
    "a seed's slip": ({"seeds": 3}, "no setting 'seeds': did you mean 'seed'"),
    "a slip": ({"temprature": 1.0}, "no setting 'temprature': did you mean 'temperature'"),
    "cold": (
        {"temperature": -1},
        r"as 0, which is greedy, or from 1e-6 to 1e6, got -1\.0",
    ),
    "warm in words": ({"temperature": "warm"}, "expected temperature as a number, got 'warm'"),
    "greedy draws": ({"temperature": 0, "do_sample": True}, "temperature from 1e-6"),
    "perhaps": ({"do_sample": "yes"}, "do_sample to be true or false, got 'yes'"),
    "all and more": ({"top_p": 1.1}, r"expected top_p above 0 and up to 1, got 1\.1"),
    "half a token kept": ({"top_k": 1.5}, r"expected top_k as a whole number, got 1\.5"),
    "negative seed": ({"seed": -1}, r"expected seed from 0 to 2\*\*63 - 1, got -1"),
    "large seed": ({"seed": 2**63, "top_k": 5}, r"expected seed from 0 to 2\*\*63 - 1"),
    "unknown bad word": ({"bad_words_ids": [[1], [288]]}, "bad_words_ids up to 287, got 288"),
    "a bad word alone": ({"bad_words_ids": [7]}, "expected bad_words_ids as a list, got 7"),
    "empty bad word": ({"bad_words_ids": [[]]}, "bad_words_ids without an empty word"),
    "more bad words than a run can take along": (
        {"bad_words_ids": [[1]] * 50_000},
        "eos_token_id of at most 786432 bytes, got 8500",
    ),
    "a bias for a token alone": (
        {"sequence_bias": {97: 1.0}},
        r"as token ids and a number, such as \{\(97,\): 1\.0\}, got \(97, 1\.0\)",
    ),
    "half a letter to stop at": ({"stop_strings": "a\ud800"}, "stop_strings as valid Unicode text"),
    "nan as temperature": ({"temperature": float("nan")}, "or from 1e-6 to 1e6, got nan"),
    "more digits than a number has": ({"top_p": 10**400}, "top_p above 0 and up to 1, got inf"),
    "endless temperature": ({"temperature": float("inf")}, "or from 1e-6 to 1e6, got inf"),
    "more at least than at most": (
        {"min_new_tokens": 9, "max_new_tokens": 8},
        "expected min_new_tokens of at most max_new_tokens, which is 8, got 9",
    ),
    "no penalty": ({"repetition_penalty": 0}, "expected repetition_penalty from 1e-6 to 1e6"),
    "negative length": ({"min_length": -1}, "expected min_length of at least 0, got -1"),
    "half a logprob": ({"logprobs": 0.5}, r"expected logprobs as a whole number, got 0\.5"),
    "text as seed": ({"seed": "lucky"}, "expected seed as a whole number, got 'lucky'"),
    "yes as penalty": ({"repetition_penalty": True}, "repetition_penalty as a number, got True"),
    "a number to stop at": ({"stop_strings": 3}, "expected stop_strings as a list, got 3"),
    "no end": ({"eos_token_id": "</s>"}, "expected eos_token_id as a list, got '</s>'"),
    "bias without a number": ({"sequence_bias": [[[1]]]}, "as token ids and a number"),
    "unknown end": ({"eos_token_id": 999}, "eos_token_id up to 287, got 999"),
    "empty stop string": ({"stop_strings": ["x", ""]}, "texts that are not empty, got ''"),
    "stop token": ({"stop_strings": [3]}, "texts that are not empty, got 3"),
    "fewer than no logprobs": ({"logprobs": -1}, "expected logprobs of at least 0, got -1"),
    "too long a prompt": ({"prompt": "x" * 512, "max_new_tokens": 1}, r"512, got 512 \+ 1"),
}


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=1, in_process=True) as engine:
        yield engine


@pytest.mark.parametrize(("asked", "match"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_can_not_be_served_is_refused(
    engine: pi.Engine, pair: Pair, asked: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        engine.start(**{"prompt": PROMPT} | asked)
    assert len(str(caught.value).splitlines()) == 1
    assert engine.generate(PROMPT, max_new_tokens=2).token_ids == pair.greedy[:2]


@pytest.mark.parametrize(
    ("strategy", "counts"),
    [
        ("speculative", ("k", "breadth", "width")),
        ("pipeinfer", ("micro_batch", "sequences")),
        ("adaptive", ("micro_batch", "ramp", "passes", "breadth", "width")),
    ],
)
def test_the_largest_settings_of_a_strategy_change_no_text(
    engine: pi.Engine, pair: Pair, strategy: str, counts: tuple[str, ...]
) -> None:
    largest: dict[str, Any] = dict.fromkeys(counts, 256)
    result = engine.generate(PROMPT, max_new_tokens=8, strategy=strategy, **largest)
    assert result.token_ids == pair.greedy[:8]


@pytest.mark.parametrize("timeout", ["a", -1, float("nan"), True, [1], Decimal(1)], ids=repr)
def test_a_result_can_not_be_waited_for_in_no_time(engine: pi.Engine, timeout: Any) -> None:
    generation = engine.start(PROMPT, max_new_tokens=2)
    with pytest.raises(ValueError, match="timeout as seconds of at least 0, or None, got"):
        generation.result(timeout)
    assert len(generation.result(10**400).token_ids) == 2


@pytest.mark.parametrize("move", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_lives_here_can_not_be_sent_or_copied(
    engine: pi.Engine, move: Callable[[Any], Any]
) -> None:
    with pytest.raises(TypeError, match=r"an engine can't be sent to workers or copied: call it"):
        move(engine)
    with pytest.raises(TypeError, match=r"an engine can't be sent to workers .* head='worker'$"):
        pickle.dumps(engine.generate)
    generation = engine.start(PROMPT, max_new_tokens=2)
    with pytest.raises(TypeError, match=r"a generation can't be sent to workers or copied: wait"):
        move(generation)
    assert move(generation.result(60))
    with (
        engine.chat(template="plain") as chat,
        pytest.raises(TypeError, match=r"a conversation can't be sent to workers or copied: go on"),
    ):
        move(chat)


def test_arguments_that_lack_or_are_too_many_are_told_with_what_is_expected(
    engine: pi.Engine,
) -> None:
    told = r"expected from_pretrained\(target, draft\) and all else by name, such as client=\.\.\."
    with pytest.raises(TypeError, match=f"{told}: missing a required argument: 'target'"):
        pi.Engine.from_pretrained()  # type: ignore[call-arg]
    too_many: Any = ("target", "draft", 3)
    with pytest.raises(TypeError, match=f"{told}: too many positional arguments"):
        pi.Engine.from_pretrained(*too_many)
    told = r"\(prompt\) and all else by name, such as max_new_tokens=\.\.\.: too many positional"
    with pytest.raises(TypeError, match=f"expected generate{told}"):
        engine.generate(PROMPT, 5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=f"expected start{told}"):
        engine.start(PROMPT, 5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"expected chat\(system\) and all else by name"):
        engine.chat("You are brief.", "plain")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no setting 'tempalte': did you mean 'template'"):
        engine.chat(tempalte="plain")  # type: ignore[call-arg]
    with engine.chat(template="plain") as chat:
        for call in (chat.start, chat.send):
            name = call.__name__
            with pytest.raises(TypeError, match=rf"expected {name}\(text\) and all else by name"):
                call("Hello", 5)  # type: ignore[call-arg]


def test_a_number_of_new_tokens_may_be_one_of_numpy(engine: pi.Engine, pair: Pair) -> None:
    asked: Any = np.int64(3)
    assert engine.generate(PROMPT, max_new_tokens=asked).token_ids == pair.greedy[:3]


def test_an_engine_that_is_closed_by_its_own_loop_says_so_and_stays_open(
    engine: pi.Engine, pair: Pair
) -> None:
    async def close() -> None:
        engine.close()

    closing = asyncio.run_coroutine_threadsafe(close(), engine._head.loop)
    with pytest.raises(RuntimeError, match=r"another thread than .*: call by asyncio\.to_thread"):
        closing.result(60)
    assert engine.generate(PROMPT, max_new_tokens=2).token_ids == pair.greedy[:2]


SCRIPT = """
import logging
import pipeinfer_dask as pi
log = logging.getLogger(__name__)
pi.Engine.from_pretrained({target!r}, stages=1)
if __name__ == "__main__":
    print("too late")
"""

IN_A_WORKER = """
import multiprocessing
import sys
import pipeinfer_dask as pi
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    sys.exit(child.exitcode)
pi.Engine.from_pretrained({target!r}, stages=1)
"""


@pytest.mark.parametrize(
    ("program", "where", "told"),
    [
        (SCRIPT, "script", '`if __name__ == "__main__":` in {script}: worker processes import'),
        (IN_A_WORKER, "script", '`if __name__ == "__main__":` in the script: worker processes'),
        (SCRIPT, "stdin", "a script in a file, which worker processes import again, got <stdin>"),
    ],
    ids=["no guard", "in a process that starts", "from stdin"],
)
def test_a_script_that_workers_would_run_again_is_refused(
    pair: Pair, tmp_path: Path, program: str, where: str, told: str
) -> None:
    script = tmp_path / "script.py"
    text = program.format(target=str(pair.target))
    script.write_text(text)
    ran = subprocess.run(
        [sys.executable, "-" if where == "stdin" else script],
        input=text,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    expected = f"RuntimeError: expected {told.format(script=script)}"
    assert ran.stderr.splitlines()[-1].startswith(expected)
    assert ran.stderr.count("Traceback") == 1


@pytest.mark.parametrize("strategy", ["speculative", "pipeinfer", "adaptive", PipeInfer()])
def test_a_strategy_that_needs_a_draft_model_is_refused_without_one(
    pair: Pair, strategy: Any
) -> None:
    with pi.Engine.from_pretrained(pair.target, stages=1, in_process=True) as engine:
        with pytest.raises(ValueError, match=r"needs a draft model: .* 'iterative'"):
            engine.start(PROMPT, strategy=strategy)
        result = engine.generate(PROMPT, max_new_tokens=5)
    assert result.strategy == "iterative"
    assert result.token_ids == pair.greedy[:5]


@pytest.mark.cluster
def test_fewer_workers_than_stages_are_refused_without_leave_to_share(
    pair: Pair, inproc_client: Client
) -> None:
    with client_of(1, loop=inproc_client.loop) as client:
        with pytest.raises(ValueError, match=r"a worker for each of 2 stages, found 1: start more"):
            pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=2)
        with pi.Engine.from_pretrained(
            pair.target, pair.draft, client=client, stages=2, share_workers=True
        ) as engine:
            assert engine.generate(PROMPT, max_new_tokens=20).token_ids == pair.greedy[:20]


@pytest.mark.cluster
def test_a_cluster_without_workers_is_refused(pair: Pair, inproc_client: Client) -> None:
    with (
        client_of(0, loop=inproc_client.loop) as client,
        pytest.raises(ValueError, match="a cluster with workers, found none: start some"),
    ):
        pi.Engine.from_pretrained(pair.target, pair.draft, client=client)


@pytest.mark.cluster
def test_workers_load_nothing_of_a_pair_that_is_refused(
    pair: Pair, tmp_path: Path, inproc_client: Client
) -> None:
    with pytest.raises(ValueError, match="vocabularies"):
        pi.Engine.from_pretrained(
            pair.target,
            make_tiny(tmp_path, "llama", layers=1, seed=0, vocab_size=300),
            client=inproc_client,
        )
    actors = inproc_client.run(lambda dask_worker: len(dask_worker.state.actors))
    assert set(actors.values()) == {0}


@pytest.mark.cluster
def test_a_client_and_no_cluster_at_all_can_not_both_be_had(
    pair: Pair, inproc_client: Client
) -> None:
    with pytest.raises(ValueError, match="a client or in_process=True, got both"):
        pi.Engine.from_pretrained(pair.target, client=inproc_client, in_process=True)


@pytest.mark.cluster
def test_a_closed_client_is_refused(pair: Pair, inproc_client: Client) -> None:
    client = Client(inproc_client.cluster, set_as_default=False)
    client.close()
    with pytest.raises(
        ValueError, match="a client that is connected to a cluster, got one that is closed"
    ):
        pi.Engine.from_pretrained(pair.target, client=client)


@pytest.mark.cluster
def test_a_client_that_must_be_awaited_is_refused(pair: Pair, inproc_client: Client) -> None:
    async def refused() -> None:
        async with Client(inproc_client.cluster, asynchronous=True, set_as_default=False) as client:
            with pytest.raises(ValueError, match="a client made with asynchronous=False"):
                pi.Engine.from_pretrained(pair.target, client=client)

    inproc_client.sync(refused)


def test_what_is_tried_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    count = sum(len(kinds) for kinds in (BROKEN, OPTIONS, REQUESTS, MISTAKES))
    what = f"{len(BROKEN)} models, {len(OPTIONS)} engines, {len(REQUESTS)} requests"
    with capsys.disabled():
        sys.stdout.write(f"{count} kinds of bad input: {what}, {len(MISTAKES)} commands\n")
    assert count >= 60
