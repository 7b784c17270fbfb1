"""Records become documents; long ones come in pieces."""

import pytest

from meshpipe.data.chat import ChatTemplate
from meshpipe.data.preparation.documents import Fields, side_of
from meshpipe.data.preparation.records import Record

ANSWER = " ".join(f"It is {n}." for n in range(200))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("kind", ["chat", "prompt"])
def test_long_conversations_and_prompts_come_in_pieces_of_one_side(kind: str) -> None:
    question = "What is it? " * 40
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
    if kind == "chat":
        fields, value, learned = Fields(chat="messages"), {"messages": messages}, f"{ANSWER}</>"
        whole = f"<user>{question}</><assistant>{learned}"
    else:
        fields, value, learned = Fields("answer", "question"), {"question": question, "answer": ANSWER}, ANSWER
        whole = question + learned
    found = list(fields.documents(Record(value, 0), ChatTemplate(TEMPLATE, {}), 64, 300))
    assert len(found) > 5
    assert "".join(one.text for one in found) == whole
    assert all(len(one.text) <= 300 for one in found)
    assert all(one.text.endswith(" ") for one in found[:-1])
    assert "".join(one.text[start:stop] for one in found for start, stop in one.answers or ()) == learned
    assert len({one.side for one in found}) == 1
    assert [one.begins for one in found] == [True, *[False] * (len(found) - 1)]
    assert [one.ends for one in found] == [*[False] * (len(found) - 1), True]


def test_pieces_of_a_long_text_are_held_out_by_themselves() -> None:
    found = list(Fields("text").documents(Record({"text": ANSWER}, 0), None, 100, 300))
    assert "".join(one.text for one in found) == ANSWER
    assert [one.side for one in found] == [side_of(one.text) for one in found]
    (one,) = Fields("text").documents(Record({"text": "It is 1."}, 0), None, 100, 300)
    assert (one.text, one.side, one.begins, one.ends) == ("It is 1.", side_of("It is 1."), True, True)
