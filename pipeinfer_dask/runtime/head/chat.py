"""A conversation as its user sees it: messages in, answers out.

Each turn renders the whole conversation anew, as the chat template wants it, and hands the
tokens on. What the KV caches hold of them is not computed again, so nothing here has to know
what a template changed in the past: a thought that it leaves out, a date that it puts in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

from pipeinfer_dask.policies import Policy
from pipeinfer_dask.runtime.head.generation import Generation
from pipeinfer_dask.runtime.head.result import Result
from pipeinfer_dask.runtime.planning.opening import explained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"
"""The template that is none."""

Start = Callable[
    [Sequence[int], int | None, str | Policy | None, Mapping[str, Any]],
    Generation,
]
Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``, as templates take it."""


class Chat:
    """A conversation with the target. Made by `Engine.chat`.

    Use it in a ``with`` block, or call `close`: both give its KV cache to others.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The target's.
    start : callable
        Starts to generate behind these tokens.
    release : callable
        Gives up the KV cache.
    system, template : str, optional
        As for `Engine.chat`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        start: Start,
        release: Callable[[], None],
        *,
        system: str | None = None,
        template: str | None = None,
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                "expected a tokenizer with a chat template, got one without: give template=, or "
                "template='plain' to go on with the text as it stands"
            )
        if template is not None and not isinstance(template, str):
            raise ValueError(f"expected template as Jinja text, or 'plain', got {template!r}")
        self._tokenizer = tokenizer
        self._start = start
        self._release = release
        self._template = template
        self._messages: list[Message] = []
        self._tokens: list[int] = []  # of a plain conversation
        # How many messages and what tokens there were before each turn.
        self._before: list[tuple[int, list[int]]] = []
        self._answer: Generation | None = None
        self._closed = False
        if system is not None:
            self._messages.append(_message("system", system))
            if template == PLAIN:
                self._tokens = self._encode(system, first=True)
        if template != PLAIN:
            # A first question shows here what is wrong with the template, before one is asked.
            first = [*self._messages, _message("user", "Hello")]
            self._render(first, "a conversation's first messages", "give another template=")
            told = self._written(first, tokenize=False)
            if first[-1]["content"].lower() not in told.lower():
                raise ValueError(
                    f"expected a chat template that shows what the user says, got {template!r}: "
                    "give Jinja text, or 'plain' to go on with the text as it stands"
                )

    @property
    def messages(self) -> list[Message]:
        """What was said so far, as chat templates take it."""
        self._settle()
        return [dict(message) for message in self._messages]

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self._closed

    @explained
    def start(
        self,
        text: str,
        *,
        max_new_tokens: int | None = None,
        strategy: str | Policy | None = None,
        **options: Any,
    ) -> Generation:
        """Say something; return the answer as it comes.

        Parameters
        ----------
        text : str
            The user's message.
        max_new_tokens : int, optional
            As for `Engine.start`.
        strategy : str or Policy, optional
            As for `Engine.start`.
        **options
            As for `Engine.start`.

        Returns
        -------
        Generation
            The answer on its way.

        Raises
        ------
        ValueError
            As `Engine.start` does; also if the template can't be applied.
        RuntimeError
            If the conversation is closed, or the last answer is still being generated.
        """
        self._check_idle()
        message = _message("user", text)
        prompt = self._prompt([*self._messages, message])
        self._answer = self._start(prompt, max_new_tokens, strategy, options)
        self._before.append((len(self._messages), self._tokens))
        self._messages.append(message)
        self._tokens = prompt
        return self._answer

    @explained
    def send(
        self,
        text: str,
        *,
        max_new_tokens: int | None = None,
        strategy: str | Policy | None = None,
        **options: Any,
    ) -> Result:
        """Say something, and wait for the answer.

        Parameters
        ----------
        text : str
            The user's message.
        max_new_tokens : int, optional
            As for `start`.
        strategy : str or Policy, optional
            As for `start`.
        **options
            As for `start`.

        Returns
        -------
        Result
            The answer.

        Raises
        ------
        ValueError, RuntimeError
            As `start` does.
        GenerationInterrupted
            If the pipeline was lost; it holds the answer so far.
        """
        answer = self.start(text, max_new_tokens=max_new_tokens, strategy=strategy, **options)
        return answer.result()

    def undo(self) -> None:
        """Take back what was said last, and the answer to it.

        Raises
        ------
        RuntimeError
            If nothing was said, or it is still being answered.
        """
        self._check_idle()
        if not self._before:
            raise RuntimeError(
                "expected a turn to take back, got a conversation without: send something first"
            )
        self._take_back()

    def close(self) -> None:
        """End the conversation, and an answer that is being generated. Can be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._answer is not None:
            self._answer.cancel()
        self._release()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a conversation can't be sent to workers or copied: go on with it here")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.messages)} messages"
        return f"<Chat {state}>"

    def _check_idle(self) -> None:
        if self._closed:
            raise RuntimeError("expected an open conversation, got a closed one: begin another")
        self._settle()
        if self._answer is not None:
            raise RuntimeError(
                "expected the last answer to be there, got one that is being generated: wait for "
                "it, or cancel it"
            )

    def _settle(self) -> None:
        """Take down the last answer once it is there; a question that failed was not asked."""
        answer = self._answer
        if answer is None or not answer.done():
            return
        self._answer = None
        if answer.status == "failed":
            self._take_back()
            return
        self._messages.append(_message("assistant", answer.text))
        self._tokens = self._tokens + answer.token_ids

    def _take_back(self) -> None:
        count, self._tokens = self._before.pop()
        del self._messages[count:]

    def _prompt(self, messages: list[Message]) -> list[int]:
        if self._template == PLAIN:
            return self._tokens + self._encode(messages[-1]["content"], first=not self._tokens)
        return self._render(messages, "these messages", "correct them, or give another template=")

    def _render(self, messages: list[Message], what: str, remedy: str) -> list[int]:
        try:
            tokens = self._written(messages)
        except Exception as error:  # whatever a template raises, and jinja itself
            reason = " ".join(str(error).split())
            raise ValueError(
                f"expected a chat template that takes {what}, got {reason}: {remedy}"
            ) from error
        return list(tokens)

    def _written(self, messages: list[Message], **how: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            add_generation_prompt=True,
            return_dict=False,
            **how,
        )

    def _encode(self, text: str, *, first: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"])


def _message(role: str, text: str) -> Message:
    if not isinstance(text, str):
        raise ValueError(f"expected a message as text, got {text!r}")
    return {"role": role, "content": text}
