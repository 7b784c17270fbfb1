"""Chat templates: conversations as the text that a model reads, and which of it are the answers."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from meshpipe.errors import ArgumentError

Message = Mapping[str, Any]
"""One message: its `role`, its `content`, and what else the template reads."""
Span = tuple[int, int]
"""Characters of a text: the first, and the one after the last."""

ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The statement by which a template itself marks what the assistant writes."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Stand around marked answers while a template is rendered; Unicode has no such characters, for uses like this."""
MOST_RENDERED = 1 << 32
"""Characters, about, that are rendered to find the answers of one conversation."""
ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT}
"""Roles of conversations with `from` and `value` in place of `role` and `content`."""


class ChatError(ValueError):
    """A conversation that cannot be written by the template; says why."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the parts of it that are answers."""

    text: str
    answers: tuple[Span, ...]


class ChatTemplate:
    """A chat template in Jinja, as models on Hugging Face have one. It runs in a sandbox.

    `tokens` are the names of special tokens that templates read, such as `bos_token`. `today` is what templates that
    write a date get; None leaves them without one, so that the same conversation gives the same text on every day.
    Raises `ArgumentError` for a template that cannot be parsed, and without Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], today: date | None = None) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._template = _compile(source, today)
        self._marks_answers = ANSWERS.search(source) is not None

    def render(self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the assistant's next answer begins.

        Raises `ChatError` for a conversation that the template refuses.
        """
        return self._render(messages, tools, prompt).replace(OPEN, "").replace(CLOSE, "")

    def with_answers(self, messages: Sequence[Message], *, tools: Any = None) -> Iterator[RenderedChat]:
        """The conversation as text with its answers: the assistant's messages, except those with a `weight` of 0.

        They are what the template marks, if it does (`{% generation %}`). Otherwise, an answer is what the text up to
        it has after its prompt. Usually that is one text. Some templates write past answers differently from the last,
        e.g. without their reasoning: then each answer has a text of its own, as it is when the model writes it.
        Raises `ChatError`, before the first text, as `render` does, and for a conversation without an answer or of so
        many that it would take minutes to find them.
        """
        wanted = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT and message.get("weight", 1)]
        if not wanted:
            raise ChatError("it has no answer to learn from: no message of the role 'assistant'")
        weighted = any("weight" in message for message in messages)
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        if self._marks_answers and not weighted:
            yield _unmarked(self._render(messages, tools, prompt=False))
        else:
            yield from self._by_prompts(messages, tools, wanted)

    def _by_prompts(self, messages: Sequence[Message], tools: Any, wanted: Sequence[int]) -> Iterator[RenderedChat]:
        whole = self.render(messages, tools=tools)
        if len(wanted) * len(whole) > MOST_RENDERED:
            raise ChatError(
                f"it has {len(wanted):,} answers in {len(whole):,} characters, which would all be rendered for each. "
                "Cut the conversation, or mark answers in the template by {% generation %}"
            )
        is_one, spans = True, list[Span]()
        for index in wanted:
            prompt = self.render(messages[:index], tools=tools, prompt=True)
            text = self._until(messages, tools, index, whole)
            if not text.startswith(prompt):
                raise ChatError(
                    f"the chat template does not begin the text of message {index + 1} with the prompt for it, so it "
                    "does not show what the answer is. Mark answers in the template by {% generation %}"
                )
            is_one = is_one and whole.startswith(text)
            spans.append((len(prompt), len(text)))
        if is_one:
            yield RenderedChat(whole, tuple(spans))
            return
        for index, span in zip(wanted, spans, strict=True):  # rendered again, so that one at a time is in memory
            yield RenderedChat(self._until(messages, tools, index, whole), (span,))

    def _until(self, messages: Sequence[Message], tools: Any, index: int, whole: str) -> str:
        """The conversation up to a message, as text; `whole` is all of it."""
        return whole if index + 1 == len(messages) else self.render(messages[: index + 1], tools=tools)

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool) -> str:
        if not all(isinstance(message.get("role"), str) for message in messages):
            raise ChatError("every message must have a role")
        try:
            text = self._template.render(
                messages=messages, tools=tools, add_generation_prompt=prompt, documents=None, **self._tokens
            )
        except RecursionError as error:
            raise ChatError("the chat template calls itself without end") from error
        except Exception as error:  # a template is a program of somebody else, and may raise anything
            raise ChatError(f"the chat template says: {error}") from error
        return str(text)


def messages_of(conversation: Any) -> list[dict[str, Any]]:
    """The messages of a conversation from a file: a list of objects with `role` and `content`, or `from` and `value`.

    Keys without a value are left out, as templates take them for text, and contents in parts become one text. Raises
    `ChatError` for anything else.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise ChatError("a conversation must be a list of messages, and not empty")
    return [_message(number, message) for number, message in enumerate(conversation, 1)]


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError(f"message {number} must be an object with role and content")
    found = {key: value for key, value in message.items() if value is not None}
    if "from" in found and "value" in found and "role" not in found:
        role = found.pop("from")
        found = {"role": ROLES.get(role, role), "content": found.pop("value"), **found}
    if not isinstance(found.get("role"), str):
        raise ChatError(f"message {number} has no role")
    if "content" not in found and "tool_calls" not in found:
        raise ChatError(f"message {number} has no content")
    if isinstance(found.get("content"), list):
        found["content"] = "".join(_text_of(part, number) for part in found["content"])
    if not isinstance(found.get("weight", 1), int | float):
        raise ChatError(f"the weight of message {number} must be 0 or 1")
    return found


def _text_of(part: Any, number: int) -> str:
    """The text of a part of a content: templates of models of text take contents whole."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ChatError(f"message {number} has a part that is no text: {kind!r:.40}")


def _unmarked(marked: str) -> RenderedChat:
    """Text and answers of a text with marks around the answers."""
    parts = re.split(f"([{OPEN}{CLOSE}])", marked)
    text, answers, size, start = [], [], 0, 0
    for part in parts:
        if part == OPEN:
            start = size
        elif part == CLOSE:
            answers.append((start, size))
        else:
            text.append(part)
            size += len(part)
    return RenderedChat("".join(text), tuple(answers))


def _compile(source: str, today: date | None) -> Any:
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ArgumentError(
            "Chat templates are rendered by Jinja. It is not installed. Install it: pip install 'meshpipe[tokens]'."
        ) from error

    class Answers(Extension):
        """The statement `generation`, which puts marks around what it encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    # As Hugging Face's own: templates are written for these settings and names.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Answers, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    if today is not None:
        environment.globals["strftime_now"] = today.strftime
    try:
        return environment.from_string(source)
    except RecursionError as error:
        raise ArgumentError(
            "The chat template must be a template of Jinja. Got one that is nested too deeply. Pass another as "
            "`chat_template`."
        ) from error
    except (jinja2.TemplateError, SyntaxError, ValueError, MemoryError) as error:  # Python's own when it is compiled
        line = getattr(error, "lineno", None)
        raise ArgumentError(
            f"The chat template must be a template of Jinja. Got one with a mistake{f' in line {line}' if line else ''}"
            f": {error}. Pass another as `chat_template`."
        ) from error


def _refuse(message: str) -> None:
    raise ChatError(message)


def _as_json(value: Any, ensure_ascii: bool = False, **style: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **style)


def begins_inside(tokens: Sequence[Span], spans: Sequence[Span]) -> Iterator[bool]:
    """For each token, given the characters that it stands for: whether the first of them is in one of the spans."""
    ordered, place = sorted(spans), 0
    for start, _ in tokens:
        while place < len(ordered) and ordered[place][1] <= start:
            place += 1
        yield place < len(ordered) and ordered[place][0] <= start
