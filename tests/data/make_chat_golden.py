"""Writes golden_chat/: conversations as Transformers renders and tokenizes them, with what the assistant wrote.

Run with Transformers installed: python tests/data/make_chat_golden.py. The answers are those that the templates mark by
the statement `generation`.
"""

import json
from pathlib import Path

from chat_templates import CONVERSATIONS, MARKED
from tiny_tokenizer import make_tokenizer

FOLDER = Path(__file__).parent / "golden_chat"


def main() -> None:
    from transformers import PreTrainedTokenizerFast

    make_tokenizer(FOLDER, chat=None)
    (FOLDER / "tokenizer_config.json").unlink()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    golden = {}
    for name, template in MARKED.items():
        for number, conversation in enumerate(CONVERSATIONS):
            found = tokenizer.apply_chat_template(
                conversation["messages"],
                tools=conversation.get("tools"),
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            prompt = tokenizer.apply_chat_template(
                conversation["messages"][:-1],
                tools=conversation.get("tools"),
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
            golden[f"{name}/{number}"] = {
                "text": tokenizer.decode(found["input_ids"]),
                "prompt": prompt,
                "tokens": found["input_ids"],
                "learned": found["assistant_masks"],
            }
    lines = (f"{json.dumps(key)}: {json.dumps(one)}" for key, one in golden.items())
    (FOLDER / "chats.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
