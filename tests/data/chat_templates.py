"""Chat templates in the styles of published models, with their answers marked, and conversations for them."""

import re

MARKED = {
    "turns": (  # a line for the role, and a token at the end of each turn
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>\n' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "instructions": (  # instructions in brackets, and the end token after answers
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ '[SYS] ' + message['content'] + ' [/SYS]' }}"
        "{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + message['content'] | trim + eos_token }}"
        "{% endgeneration %}{% else %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "thoughts": (  # only the last answer keeps its thoughts, and tools are shown
        "{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|end|>' }}"
        "{% endif %}"
        "{% for message in messages %}{{ '<|' + message.role + '|>' }}{% if message.role == 'assistant' %}"
        "{% generation %}{% if loop.last %}{{ '<think>' + message.reasoning_content | default('') + '</think>' }}"
        "{% endif %}{{ message.content + '<|end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
}
PLAIN = {name: re.sub(r"\{% (end)?generation %\}", "", template) for name, template in MARKED.items()}
"""The same templates as they are published: without marks."""

CONVERSATIONS: list[dict] = [
    {
        "messages": [
            {"role": "user", "content": "What is two and two?"},
            {"role": "assistant", "content": "It is four."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Wie geht es dir?"},
            {"role": "assistant", "content": "Danke, gut 😀\n\nUnd dir?"},
            {"role": "user", "content": "gut"},
            {"role": "assistant", "content": "It was the best of times, it was the worst of times."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"a": "ä < b"}}}],
    },
]
