"""Continues the golden prompts in this process, one of several perhaps; prints the tokens, and the scores of texts."""

import json

import golden
import jax
from member import join_run, place_parser

import meshpipe
from meshpipe.processes.coordination import barrier
from meshpipe.processes.guard import leave

ENDS = (2, 5, 12)
"""Tokens of each text when others follow it."""


def main() -> None:
    parser = place_parser()
    parser.add_argument("names")
    parser.add_argument("pipeline", type=int)
    parser.add_argument("tensor", type=int)
    flags = parser.parse_args()
    names, pipeline, tensor = flags.names.split(","), flags.pipeline, flags.tensor
    join_run(flags, pipeline * tensor // (flags.process_count or 1))
    found = {}
    for name in names:
        expected = golden.expected(name)
        prompts = [
            row[:length].tolist() for row, length in zip(expected["ids"], expected["prompt_lengths"], strict=True)
        ]
        mesh = meshpipe.make_mesh(pipeline, 1, tensor)
        generator = meshpipe.Generator(golden.CONFIGS[name], golden.leaves(name), mesh=mesh, batch_size=2)
        tokens = generator.tokens(prompts, max_tokens=expected["continuation"].shape[1])
        prefixes = [row[:end] for row, end in zip(tokens, ENDS, strict=True)]
        followed = generator.tokens(
            prompts * 3, max_tokens=len(tokens[0]), stop_when=lambda drawn, ended=prefixes: drawn in ended
        )
        scores = generator.scorer.tokens([(row[:1], row[1:]) for row in expected["ids"].tolist()])
        found[name] = {"tokens": tokens, "followed": followed, "logprobs": [score.logprob for score in scores]}
    print("RESULT", json.dumps(found), flush=True)
    if jax.process_count() > 1:
        barrier("end", 60.0)
        leave(0)


if __name__ == "__main__":
    main()
