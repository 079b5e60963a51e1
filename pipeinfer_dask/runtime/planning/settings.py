"""What may be asked of a generation, in the words of transformers' `GenerationConfig`."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from math import inf
from typing import Any

from transformers import GenerationConfig

from pipeinfer_dask.policies import STRATEGIES
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.runtime.links.bounds import MOST_SETTINGS, of_settings

Settings = Mapping[str, Any]

FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
WHEN_SAMPLING = (
    *("temperature", "top_k", "top_p", "top_h", "min_p"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)
"""Settings that say how to sample; any of them asks for it."""
PROCESSING = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "min_length", "min_new_tokens", "stop_strings"),
)
"""Settings that change greedy texts, too."""
HONOURED = frozenset((*WHEN_SAMPLING, *PROCESSING, "do_sample", "max_new_tokens", "eos_token_id"))
NO_MATTER = frozenset(
    (
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("compile_config", "disable_compile", "low_memory", "prefill_chunk_size"),
        *("pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"),
        # Of beams, of assistants, or of what follows the pick: without these, without effect.
        *("early_stopping", "length_penalty", "renormalize_logits", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    )
)
"""Settings that change no text that we could give."""
NEUTRAL: Settings = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "prompt_lookup_num_tokens": 0,
}
"""Values other than None and False by which a setting that we don't honour asks for nothing."""
BESIDE = frozenset(("seed", "logprobs"))
"""Settings that `GenerationConfig` lacks."""
INSTEAD = {
    "max_length": "use max_new_tokens",
    "max_time": "cancel the generation after that time",
    "output_scores": "use logprobs",
    "output_logits": "use logprobs",
    "num_return_sequences": "start several generations, each with a seed of its own",
}


def split(options: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell settings, the fields of `GenerationConfig` and our own, from the knobs of a strategy.

    Raises
    ------
    ValueError
        If a name is neither.
    """
    fields_and_ours = FIELDS | BESIDE
    settings = {name: value for name, value in options.items() if name in fields_and_ours}
    knobs = {name: value for name, value in options.items() if name not in fields_and_ours}
    known = {
        knob.name: None
        for kind in STRATEGIES.values()
        for knob in fields(kind)  # type: ignore[arg-type]
        if knob.init
    }
    for name in knobs:
        if name in known:
            continue
        if near := get_close_matches(name, (*HONOURED, *BESIDE, *known), n=1, cutoff=0.8):
            raise ValueError(f"there is no setting {name!r}: did you mean {near[0]!r}?")
        raise ValueError(
            "expected a field of GenerationConfig, such as temperature, or a knob of a strategy "
            f"({', '.join(known)}), got {name!r}"
        )
    return settings, knobs


def requested(
    generation_config: GenerationConfig | Settings | None, keywords: Settings
) -> dict[str, Any]:
    """Return what a user asks for: the keywords, and where they say nothing the configuration.

    Raises
    ------
    ValueError
        If there is no such setting, or we can't honour it.
    """
    if generation_config is None:
        given: dict[str, Any] = {}
    elif isinstance(generation_config, GenerationConfig):
        # What else it may hold comes from a model's files, and generate looks at it as little.
        given = {name: getattr(generation_config, name, None) for name in FIELDS}
    elif isinstance(generation_config, Mapping):
        given = dict(generation_config)
    else:
        raise ValueError(
            f"expected generation_config as a GenerationConfig or a dict, got {generation_config!r}"
        )
    given |= {name: value for name, value in keywords.items() if value is not None}
    for name, value in given.items():
        if name not in FIELDS:
            raise ValueError(f"expected fields of GenerationConfig, got {name!r}")
        if asks_for_more(name, value):
            hint = INSTEAD.get(name, "leave it out")
            raise ValueError(f"{name}={value!r} is not supported: {hint}")
    return {name: value for name, value in given.items() if name in HONOURED and value is not None}


def asks_for_more(name: str, value: object) -> bool:
    """Whether a field of `GenerationConfig` asks for what we don't do."""
    if name in HONOURED or name in NO_MATTER or value is None or value is False:
        return False
    return value != NEUTRAL.get(name) and value not in ((), [], {})


def stated(generation_config: Settings) -> tuple[dict[str, Any], list[str]]:
    """Return what a checkpoint's generation_config.json is honoured in, and what it can't be.

    Its way to sample, if it isn't greedy, is that of a user who samples; whether to sample, and
    how much, the user says.
    """
    greedy = generation_config.get("do_sample") is False or not generation_config.get(
        "temperature", 1
    )
    ours = {
        name: generation_config[name]
        for name in (*(() if greedy else WHEN_SAMPLING), *PROCESSING)
        if generation_config.get(name) is not None
    }
    beyond = [
        f"{name}={value}"
        for name, value in generation_config.items()
        if name in FIELDS - {"max_length", "max_time"} and asks_for_more(name, value)
    ]
    return ours, beyond


def sampling_of(
    asked: Settings,
    defaults: Settings,
    *,
    prompt_length: int,
    vocab_size: int,
    end_tokens: Iterable[int],
    seed: int | None,
    logprobs: int,
) -> Sampling | None:
    """Return how tokens are picked; None where it is always the most probable one.

    Parameters
    ----------
    asked : mapping
        What the user asks for.
    defaults : mapping
        What the checkpoint states.
    prompt_length, vocab_size : int
        In tokens.
    end_tokens : iterable of int
    seed : int, optional
        By default a random one is drawn, if it is needed.
    logprobs : int

    Raises
    ------
    ValueError
        If a value is of a wrong kind or out of range.
    """
    samples = asked.get("do_sample")
    if samples is None:
        samples = any(name in asked for name in WHEN_SAMPLING) and asked.get("temperature") != 0
    elif not isinstance(samples, bool):
        raise ValueError(f"expected do_sample to be true or false, got {samples!r}")
    both = {**defaults, **asked}
    values: dict[str, Any] = {}
    for name in WHEN_SAMPLING if samples else ():
        if name in both:
            read = count if name == "top_k" else number
            values[name] = read(name, both[name])
    temperature = values.get("temperature", 1.0)
    if asked.get("do_sample") is None and not 1e-6 <= temperature <= 1e6:
        raise ValueError(
            f"expected temperature as 0, which is greedy, or from 1e-6 to 1e6, got {temperature}"
        )
    if seed is not None and not 0 <= whole("seed", seed) < 2**63:
        raise ValueError(f"expected seed from 0 to 2**63 - 1, got {seed}")
    if count("logprobs", logprobs) > vocab_size:
        raise ValueError(
            f"expected logprobs from 0 to {vocab_size}, the tokens that there are, got {logprobs}"
        )
    if samples:
        values["seed"] = secrets.randbits(32) if seed is None else seed
    if "repetition_penalty" in both:
        values["repetition_penalty"] = number("repetition_penalty", both["repetition_penalty"])
    if "no_repeat_ngram_size" in both:
        values["no_repeat_ngram_size"] = count("no_repeat_ngram_size", both["no_repeat_ngram_size"])
    if "suppress_tokens" in both:
        values["suppress_tokens"] = ids("suppress_tokens", both["suppress_tokens"], vocab_size)
    if "bad_words_ids" in both:
        words = listed("bad_words_ids", both["bad_words_ids"])
        values["bad_words_ids"] = tuple(ids("bad_words_ids", word, vocab_size) for word in words)
    if "sequence_bias" in both:
        values["sequence_bias"] = biases(both["sequence_bias"], vocab_size)
    shortest = count("min_length", both.get("min_length", 0))
    if "min_new_tokens" in both:
        new = count("min_new_tokens", both["min_new_tokens"])
        shortest = max(shortest, prompt_length + new if new else 0)
    if shortest > prompt_length:
        values["min_length"] = shortest
    values["logprobs"] = logprobs
    sampling = Sampling(**values)
    if sampling == Sampling():
        return None
    sampling = Sampling(**values, end_tokens=tuple(sorted(end_tokens)))
    if (nbytes := of_settings(sampling)) > MOST_SETTINGS:
        raise ValueError(
            "expected bad_words_ids, sequence_bias, suppress_tokens and eos_token_id of at most "
            f"{MOST_SETTINGS} bytes, got {nbytes}: each run takes them along, so name fewer tokens"
        )
    return sampling


def number(name: str, value: object) -> float:
    """Return a setting as a float."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number of hundreds of digits
        return inf
    except (TypeError, ValueError):
        raise ValueError(f"expected {name} as a number, got {value!r}") from None


def whole(name: str, value: object) -> int:
    """Return a setting as a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"expected {name} as a whole number, got {value!r}") from None


def count(name: str, value: object) -> int:
    """Return a setting as a whole number of at least 0."""
    if (number := whole(name, value)) < 0:
        raise ValueError(f"expected {name} of at least 0, got {value!r}")
    return number


def listed(name: str, value: object) -> list[Any]:
    """Return a setting as a list."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"expected {name} as a list, got {value!r}")
    return list(value)


def ids(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """Return a setting as token ids."""
    tokens = tuple(count(f"token ids in {name}", token) for token in listed(name, value))
    if beyond := [token for token in tokens if token >= vocab_size]:
        raise ValueError(f"expected token ids in {name} up to {vocab_size - 1}, got {beyond[0]}")
    return tokens


def biases(value: object, vocab_size: int) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Return ``sequence_bias``, a dict or the list of pairs that JSON makes of it."""
    pairs = list(value.items()) if isinstance(value, Mapping) else listed("sequence_bias", value)
    for pair in pairs:
        if len(both := listed("sequence_bias", pair)) != 2 or not isinstance(both[0], Iterable):
            raise ValueError(
                f"expected sequence_bias as token ids and a number, such as {{(97,): 1.0}}, got "
                f"{pair!r}"
            )
    return tuple(
        (ids("sequence_bias", words, vocab_size), number("sequence_bias", bias))
        for words, bias in pairs
    )


def texts(name: str, value: object) -> tuple[str, ...]:
    """Return a setting that is one string or several."""
    strings = (value,) if isinstance(value, str) else tuple(listed(name, value))
    if wrong := [text for text in strings if not isinstance(text, str) or not text]:
        raise ValueError(f"expected {name} as texts that are not empty, got {wrong[0]!r}")
    for text in strings:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"expected {name} as valid Unicode text: {error}") from None
    return strings
