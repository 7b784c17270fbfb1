"""Runs the tasks of EleutherAI's lm-evaluation-harness: `python -m meshpipe.generation.harness` is its command line,
which has the model `meshpipe`. It comes with the extra `harness`.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    message = f"The tasks need lm-evaluation-harness: {error}. Install it: pip install 'meshpipe[harness]'."
    if __name__ == "__main__":
        print(f"meshpipe: {message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(message) from error

from meshpipe.data.chat import ChatTemplate
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.generation.saved import Saved, open_saved
from meshpipe.generation.stop_texts import StopTexts
from meshpipe.generation.tokenizer import TextTokenizer, encode_pair, encode_text, first_token
from meshpipe.mesh import MeshConfig, use_cpu_devices

_log = logging.getLogger("lm_eval.meshpipe")

DEFAULT_LENGTH = 2048
"""The most tokens of a text, for a model that nothing is known of."""
SAMPLING = frozenset({"temperature", "top_k", "top_p"})
"""Settings of a task that are fields of `SamplingConfig`."""
SETTINGS = SAMPLING | {"do_sample", "until", "max_gen_toks"}


@register_model("meshpipe")
class MeshpipeLM(LM):
    """A checkpoint or a folder of published weights, on a mesh, for the tasks of the harness."""

    def __init__(
        self,
        pretrained: str,
        *,
        pipeline: int = 1,
        data: int = 1,
        tensor: int = 1,
        batch_size: int | str = 8,
        in_flight: int | None = None,
        step: int | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        prefix_token_id: int | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        compile_cache: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Reads the weights.

        Arguments:
            pretrained: Folder of checkpoints, or of published weights.
            pipeline: Ranks of the pipeline; `data` and `tensor` are the other axes of the mesh.
            data: Parts into which texts are split.
            tensor: Parts into which heads, hidden units and vocabulary are split.
            batch_size: The most texts of a group.
            in_flight: Groups that run at a time; by default as many as there are ranks.
            step: Of the checkpoint; by default the newest.
            tokenizer: File or folder, in place of what the folder tells.
            max_length: The most tokens of a text, of which the last are kept; by default what the folder tells.
            max_gen_toks: The most tokens to generate where a task does not say.
            seed: Of what tasks draw.
            prefix_token_id: What a text without a context comes after; by default the tokenizer's begin or end token.
            dtype: Compute in this dtype; by default as `open_saved` does.
            compile_cache: Folder that keeps compiled programs for later.
            device: What the harness asks for, always. A line in its log says that JAX chooses the devices.
            max_batch_size: Must be None: batch sizes are not searched for.

        Raises `ValueError` for a folder, mesh or argument that does not fit.
        """
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdigit():
            raise ArgumentError(f"`batch_size` must be a whole number, without a search. Got {batch_size!r}.")
        mesh = MeshConfig(pipeline=pipeline, data=data, tensor=tensor)
        use_cpu_devices(mesh.num_devices)
        devices = mesh.build()
        _log.info("Running on %s, as JAX chooses; device %s is not read.", devices.devices.flat[0].device_kind, device)
        self.saved = open_saved(pretrained, step, tokenizer, dtype=dtype)
        if self.saved.tokenizer is None:
            raise ArgumentError(f"Tasks are text, and need a tokenizer. {self.saved.name} has none. Pass `tokenizer`.")
        self.tokenizer: TextTokenizer = self.saved.tokenizer
        self.max_length = _max_length(self.saved) if max_length is None else max_length
        check_whole("max_length", self.max_length, 2)
        check_whole("max_gen_toks", max_gen_toks)
        self.max_gen_toks, self.seed, self._prefix = max_gen_toks, seed, prefix_token_id
        self.generator = self.saved.generator(
            devices, batch_size=int(batch_size), in_flight=in_flight, compile_cache=compile_cache
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For requests with `args` (context, continuation): the log-probability, and whether it is greedy."""
        pairs = [self._pair(*request.args) for request in requests]
        found = self._scores(pairs, "loglikelihood", disable_tqdm)
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For requests with `args` (text,): the log-probability of the whole text, in windows of `max_length`."""
        windows = [self._windows(*request.args) for request in requests]
        scores = iter(self._scores([pair for own in windows for pair in own], "loglikelihood_rolling", disable_tqdm))
        found = [sum(next(scores)[0] for _ in own) for own in windows]
        for request, logprob in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For requests with `args` (context, settings): what follows the context, up to the first text of `until`."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
            for numbers in alike.values():
                settings = requests[numbers[0]].args[1]
                texts = self._generated([requests[number].args[0] for number in numbers], settings)
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                progress.update(len(numbers))
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Raises `ValueError` for a tokenizer without a chat template."""
        return self._template().render(chat_history, prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template().source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return repr(self.tokenizer)

    def _template(self) -> ChatTemplate:
        make = getattr(self.tokenizer, "template", None)
        template = None if make is None else make()
        if template is None:
            raise ArgumentError("A chat template was asked for. The tokenizer has none. Leave it out.")
        return template

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Their tokens, of which the last `max_length` are kept, and the one in front of these."""
        if context:
            before, after = encode_pair(self.tokenizer, context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tokenizer.encode(continuation, special=False)
        if len(after) > self.max_length:
            raise ArgumentError(
                f"A continuation must have at most `max_length` {self.max_length} tokens. Got one of {len(after)}."
            )
        return before[-(self.max_length + 1 - len(after)) :], after

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens = self.tokenizer.encode(text, special=False)
        prefix = self.prefix_token_id
        return list(map(make_disjoint_window, get_rolling_token_windows(tokens, prefix, self.max_length, 1)))

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context comes after."""
        if self._prefix is not None:
            return self._prefix
        if self.tokenizer.begin is None and self.tokenizer.end is None:
            raise ArgumentError(
                "A task has texts without a context, which need a token to come after. The tokenizer has none that "
                "begins or ends texts. Pass `prefix_token_id`."
            )
        return first_token(self.tokenizer)

    def _scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], name: str, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        found = [(0.0, True)] * len(pairs)
        scores = self.generator.scorer.stream(pairs)
        for number, score in tqdm(scores, total=len(pairs), desc=name, disable=disable_tqdm):
            found[number] = score.logprob, score.is_greedy
        return found

    def _generated(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        asked = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        if unknown := sorted(asked.keys() - SETTINGS):
            raise ArgumentError(f"A task generates with {', '.join(unknown)}, which meshpipe does not have.")
        if asked.get("do_sample"):
            asked.setdefault("temperature", 1.0)
        most = asked["max_gen_toks"]
        if most >= self.max_length:
            raise ArgumentError(
                f"`max_gen_toks` must leave room for a context below `max_length` {self.max_length}. Got {most}."
            )
        stops = StopTexts(self.tokenizer, tuple(text for text in asked["until"] if text))
        found = self.generator.tokens(
            [self._context(text)[-(self.max_length - most) :] for text in contexts],
            stop_when=stops.is_in,
            max_tokens=most,
            stop_tokens=self.generator.ends,
            seed=self.seed,
            **{name: asked[name] for name in SAMPLING & asked.keys()},
        )
        return [stops.cut(self.tokenizer.decode(tokens)) for tokens in found]

    def _context(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text) or [self.prefix_token_id]


def _max_length(saved: Saved) -> int:
    """The positions of the model, or those that its config.json tells of."""
    return getattr(saved.model, "max_positions", None) or saved.longest_text or DEFAULT_LENGTH


def main() -> None:
    """The command line of the harness, with the model `meshpipe`."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    # For standard errors of perplexities it would fork, which can block for ever beside JAX's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        cli_evaluate()
    except ValueError as error:
        if not type(error).__module__.startswith("meshpipe."):
            raise
        print(f"meshpipe: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
