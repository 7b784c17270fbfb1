"""Conversations have the text and the answers that Transformers gives them (golden_chat/)."""

import json
from datetime import date
from pathlib import Path

import pytest
from chat_templates import CONVERSATIONS, MARKED, PLAIN

from meshpipe.data.chat import ChatError, ChatTemplate, messages_of
from meshpipe.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "golden_chat"
GOLDEN = json.loads((FOLDER / "chats.json").read_text())
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
QUESTION, ANSWER = {"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}


def encoded(template: str, conversation: dict) -> list[tuple[list[int], list[int]]]:
    """Tokens of each text of a conversation, and whether each is learned."""
    tokenizer = Tokenizer(FOLDER)
    found = list(ChatTemplate(template, NAMES).with_answers(conversation["messages"], tools=conversation.get("tools")))
    tokens = tokenizer.encode_spans([one.text for one in found], [one.answers for one in found], special=False)
    return [(ids.tolist(), inside.astype(int).tolist()) for ids, inside in tokens]


@pytest.mark.parametrize("key", GOLDEN)
def test_marked_answers_are_those_of_transformers(key: str) -> None:
    name, number = key.split("/")
    conversation, golden = CONVERSATIONS[int(number)], GOLDEN[key]
    assert encoded(MARKED[name], conversation) == [(golden["tokens"], golden["learned"])]
    messages, tools = conversation["messages"], conversation.get("tools")
    for template in (MARKED[name], PLAIN[name]):
        assert ChatTemplate(template, NAMES).render(messages, tools=tools) == golden["text"]
        assert ChatTemplate(template, NAMES).render(messages[:-1], tools=tools, prompt=True) == golden["prompt"]


@pytest.mark.parametrize("key", [key for key in GOLDEN if key != "thoughts/1"])
def test_answers_are_found_where_the_template_does_not_mark_them(key: str) -> None:
    name, number = key.split("/")
    assert encoded(PLAIN[name], CONVERSATIONS[int(number)]) == [(GOLDEN[key]["tokens"], GOLDEN[key]["learned"])]


def test_each_answer_has_its_own_text_where_the_template_rewrites_past_answers() -> None:
    first, second = encoded(PLAIN["thoughts"], CONVERSATIONS[1])
    tokenizer = Tokenizer(FOLDER)

    def learned(tokens: list[int], inside: list[int]) -> str:
        return tokenizer.decode([token for token, is_in in zip(tokens, inside, strict=True) if is_in], special=True)

    answers = [message["content"] for message in CONVERSATIONS[1]["messages"] if message["role"] == "assistant"]
    assert learned(*first) == f"<think></think>{answers[0]}<|end|>"
    assert learned(*second) == f"<think></think>{answers[1]}<|end|>"
    assert second[0] == GOLDEN["thoughts/1"]["tokens"]


def test_an_answer_of_weight_0_is_not_learned() -> None:
    messages = [QUESTION, {**ANSWER, "weight": 0}, QUESTION, ANSWER]
    for template in (PLAIN["turns"], MARKED["turns"]):
        (found,) = ChatTemplate(template, NAMES).with_answers(messages)
        assert [found.text[start:stop] for start, stop in found.answers] == ["four<|end|>\n"]
        assert found.text.count("four") == 2
    with pytest.raises(ChatError, match="no answer to learn from"):
        list(ChatTemplate(PLAIN["turns"], NAMES).with_answers(messages[:2]))


def test_messages_of_other_shapes_are_read() -> None:
    found = messages_of([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}])
    assert found == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert messages_of([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a b"}]


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        ([], "not empty"),
        ("hello", "list of messages"),
        ([3], "message 1 must be an object"),
        ([QUESTION, {"content": "a"}], "message 2 has no role"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 has a part that is no text: 'image_url'"),
        ([{**QUESTION, "weight": "all"}], "weight of message 1"),
    ],
)
def test_what_is_no_conversation_is_said(conversation: object, problem: str) -> None:
    with pytest.raises(ChatError, match=problem):
        messages_of(conversation)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "the chat template says: roles must alternate"),
        ("{{ messages[7].content }}", "the chat template says: .*"),
        ("{{ strftime_now('%Y') }}", "the chat template says: 'strftime_now' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template calls itself without end"),
        ("{{ messages | map('nosuch') | list }}", "the chat template says: No filter named 'nosuch'"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "does not begin the text of message 2"),
    ],
)
def test_what_a_template_refuses_is_said(template: str, problem: str) -> None:
    with pytest.raises(ChatError, match=problem):
        list(ChatTemplate(template, NAMES).with_answers([QUESTION, ANSWER]))


def test_a_conversation_that_would_take_minutes_is_refused() -> None:
    many = [QUESTION, ANSWER] * 20_000
    with pytest.raises(ChatError, match=r"has 20,000 answers in .* characters, which would all be rendered"):
        list(ChatTemplate(PLAIN["turns"], NAMES).with_answers(many))
    (found,) = ChatTemplate(MARKED["turns"], NAMES).with_answers(many)
    assert len(found.answers) == 20_000


def test_a_template_with_a_mistake_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"mistake in line 2: .*Pass another as `chat_template`"):
        ChatTemplate("{{ messages }}\n{% for %}", NAMES)
    loops = 30
    with pytest.raises(ValueError, match=r"too many statically nested blocks.*Pass another as `chat_template`"):
        ChatTemplate("{% for m in messages %}" * loops + "{% endfor %}" * loops, NAMES)
    with pytest.raises(ValueError, match=r"nested too deeply. Pass another as `chat_template`"):
        ChatTemplate("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", NAMES)


def test_a_template_cannot_reach_python() -> None:
    with pytest.raises(ChatError, match=r"unsafe|undefined"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", NAMES).render([QUESTION])


def test_a_date_is_what_it_is_told_to_be() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", NAMES, date(2026, 1, 31))
    assert template.render([QUESTION]) == "31 Jan 2026"
