"""Conversations: what was said is kept, and read once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import pipeinfer_dask as pi
from pipeinfer_dask.engine import EngineClosedError, GenerationInterrupted
from pipeinfer_dask.runtime.head.chat import Chat
from tests.engine.pairs import Pair, greedy_tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{{ messages | length }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};"
    "{% endfor %}<assistant>"
)
"""Begins otherwise with each turn."""
SAID = ("def main", "and then?", "return it")


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        yield engine


def prompt_of(result: pi.Result, chat: Chat) -> list[int]:
    """Return what a template makes of the conversation before this answer."""
    messages = chat.messages[:-1]
    assert chat.messages[-1] == {"role": "assistant", "content": result.text}
    text = "".join(f"<{m['role']}>{m['content']};" for m in messages) + "<assistant>"
    return list(chat._tokenizer(text)["input_ids"])


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
def test_each_answer_is_what_the_whole_conversation_gives_anew(
    engine: pi.Engine, pair: Pair, strategy: str
) -> None:
    with engine.chat("be brief", template=TEMPLATE) as chat:
        before: list[int] = []
        for text in SAID:
            result = chat.send(text, max_new_tokens=12, strategy=strategy)
            prompt = prompt_of(result, chat)
            assert result.token_ids == greedy_tokens(pair.target, prompt, 12)
            # What the caches hold of it is not read again.
            shared = next(
                (
                    i
                    for i, pair in enumerate(zip(before, prompt, strict=False))
                    if len(set(pair)) > 1
                ),
                min(len(before), len(prompt)),
            )
            assert result.metrics.prefilled_tokens == len(prompt) - shared
            assert strategy == "iterative" or result.metrics.generated_tokens == 12
            # The last token was not evaluated: nothing came after it.
            before = [*prompt, *result.token_ids[:-1]]


def test_a_plain_conversation_goes_on_with_the_text(engine: pi.Engine, pair: Pair) -> None:
    with engine.chat(template="plain") as chat:
        tokens: list[int] = []
        for count, text in enumerate(SAID):
            new = list(engine.tokenizer(text)["input_ids"])
            tokens += new
            result = chat.send(text, max_new_tokens=10)
            assert result.token_ids == greedy_tokens(pair.target, tokens, 10)
            assert result.metrics.prefilled_tokens == len(new) + (count > 0)
            tokens += result.token_ids
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_a_template_that_changes_the_past_has_it_read_again(engine: pi.Engine, pair: Pair) -> None:
    with engine.chat(template=FORGETFUL) as chat:
        chat.send(SAID[0], max_new_tokens=8)
        result = chat.send(SAID[1], max_new_tokens=8)
        messages = chat.messages[:-1]
        text = "3" + "".join(f"<{m['role']}>{m['content']};" for m in messages) + "<assistant>"
        prompt = list(engine.tokenizer(text)["input_ids"])
        assert result.token_ids == greedy_tokens(pair.target, prompt, 8)
        assert result.metrics.prefilled_tokens == len(prompt)


def test_the_last_turn_can_be_taken_back(engine: pi.Engine) -> None:
    for template in (TEMPLATE, "plain"):
        with engine.chat("be brief", template=template) as chat:
            chat.send(SAID[0], max_new_tokens=8)
            first = chat.send(SAID[1], max_new_tokens=8)
            chat.undo()
            assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
            again = chat.send(SAID[1], max_new_tokens=8)
            assert again.token_ids == first.token_ids
            # It differs from what the cache holds from the answer on, if at all.
            assert again.metrics.prefilled_tokens <= first.metrics.prefilled_tokens
            chat.undo()
            chat.undo()
            with pytest.raises(RuntimeError, match="expected a turn to take back"):
                chat.undo()


def test_answers_come_as_they_are_made_and_can_be_cancelled(engine: pi.Engine, pair: Pair) -> None:
    with engine.chat(template=TEMPLATE) as chat:
        answer = chat.start(SAID[0], max_new_tokens=300)
        next(iter(answer))
        with pytest.raises(RuntimeError, match="expected the last answer to be there"):
            chat.start(SAID[1])
        answer.cancel()
        so_far = answer.result(60).text
        assert chat.messages[-1] == {"role": "assistant", "content": so_far}
        result = chat.send(SAID[1], max_new_tokens=8)
        assert result.token_ids == greedy_tokens(pair.target, prompt_of(result, chat), 8)
        # How the text so far is cut into tokens may differ; the first question is the same.
        question = engine.tokenizer(f"<user>{SAID[0]};<assistant>")["input_ids"]
        new = len(prompt_of(result, chat)) - len(question)
        assert result.metrics.prefilled_tokens <= new


def test_a_conversation_gives_way_to_others_and_reads_its_text_again(pair: Pair) -> None:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, in_process=True, max_concurrent=2
    ) as engine:
        first, second, third = (engine.chat(template="plain") for _ in range(3))
        for chat in (first, second, third):  # the first one's cache is given to the third
            chat.send(SAID[0], max_new_tokens=8)
        long = engine.tokenizer(SAID[0])["input_ids"]
        kept = third.send(SAID[1], max_new_tokens=8)
        assert kept.metrics.prefilled_tokens < len(long) + 8
        again = first.send(SAID[1], max_new_tokens=8)
        assert again.token_ids == kept.token_ids
        assert again.metrics.prefilled_tokens == len(long) + 8 + len(SAID[1])
        first.close()
        assert third.send(SAID[2], max_new_tokens=8).metrics.prefilled_tokens < len(long) + 8


def test_conversations_and_generations_run_side_by_side(engine: pi.Engine, pair: Pair) -> None:
    chats = [engine.chat(template="plain") for _ in range(2)]
    with engine.chat(template="plain") as chat:
        alone = [chat.send(text, max_new_tokens=10).token_ids for text in SAID]
    for turn, text in enumerate(SAID):
        answers = [chat.start(text, max_new_tokens=10) for chat in chats]
        beside = engine.start(list(b"def main"), max_new_tokens=10)
        assert [answer.result(60).token_ids for answer in answers] == [alone[turn]] * 2
        assert beside.result(60).token_ids == greedy_tokens(pair.target, list(b"def main"), 10)
    for chat in chats:
        chat.close()


def test_lookup_drafts_know_the_whole_conversation(pair: Pair) -> None:
    with (
        pi.Engine.from_pretrained(pair.target, "ngram", stages=2, in_process=True) as engine,
        engine.chat(template="plain") as chat,
    ):
        tokens: list[int] = []
        for text in SAID:
            tokens += engine.tokenizer(text)["input_ids"]
            result = chat.send(text, max_new_tokens=20)
            assert result.token_ids == greedy_tokens(pair.target, tokens, 20)
            tokens += result.token_ids


def test_what_is_closed_says_so(pair: Pair) -> None:
    engine = pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True)
    chat = engine.chat(template="plain")
    answer = chat.start(SAID[0], max_new_tokens=400)
    chat.close()
    chat.close()
    assert answer.result(60).finish_reason == "stopped"
    assert chat.closed and "closed" in repr(chat)
    with pytest.raises(RuntimeError, match="expected an open conversation"):
        chat.send(SAID[1])
    other = engine.chat(template="plain")
    interrupted = other.start(SAID[0], max_new_tokens=400)
    next(iter(interrupted))
    engine.close()
    with pytest.raises(GenerationInterrupted):
        interrupted.result(60)
    assert other.messages == []  # what has failed was not said
    with pytest.raises(EngineClosedError):
        other.send(SAID[1])
    with pytest.raises(EngineClosedError):
        engine.chat(template="plain")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "expected a tokenizer with a chat template"),
        ({"system": 3, "template": "plain"}, "expected a message as text"),
        ({"template": 3}, "expected template as Jinja text, or 'plain', got 3"),
        (
            {"template": "{{ foo"},
            "template that takes a conversation's first messages, got .*: give another",
        ),
        ({"template": "plian"}, "template that shows what the user says, got 'plian': give Jinja"),
    ],
)
def test_what_is_no_conversation_is_refused(
    engine: pi.Engine, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        engine.chat(**options)


def test_a_message_that_a_template_refuses_was_not_said(engine: pi.Engine) -> None:
    refusing = (
        "{% if messages | length > 1 %}{{ raise_exception('one is enough') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    with engine.chat(template=refusing) as chat:
        chat.send(SAID[0], max_new_tokens=4)
        for text, reason in ((SAID[1], "one is enough"), (3, "expected a message as text")):
            with pytest.raises(ValueError, match=reason):
                chat.send(text)  # type: ignore[arg-type]
        assert len(chat.messages) == 2
        chat.undo()
        with pytest.raises(ValueError, match="max_new_tokens"):
            chat.send(SAID[1], max_new_tokens=0)
        assert chat.messages == []


def test_the_tokenizers_own_template_is_used(pair: Pair, tmp_path: Path) -> None:
    target = Path(shutil.copytree(pair.target, tmp_path / "target"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    with (
        pi.Engine.from_pretrained(target, pair.draft, stages=2, in_process=True) as engine,
        engine.chat("be brief") as chat,
    ):
        result = chat.send(SAID[0], max_new_tokens=8)
        assert result.token_ids == greedy_tokens(target, prompt_of(result, chat), 8)
