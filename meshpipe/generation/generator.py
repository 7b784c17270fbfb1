"""Continues texts with a language model whose stages live on the submeshes of a mesh."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.lora import with_lora
from meshpipe.compiler.cache import open_cache
from meshpipe.errors import ArgumentError, check_whole, kind_of
from meshpipe.generation.caches import Caches
from meshpipe.generation.caching_model import POSITIONS, CachingModel
from meshpipe.generation.config import SamplingConfig
from meshpipe.generation.decoder import Decoder
from meshpipe.generation.lengths import LEAST_BEGINNING, check_stop_tokens, check_tokens, power_of_two
from meshpipe.generation.requests import Drawn, Request, StopWhen, tokens_of
from meshpipe.generation.running_group import RunningGroup
from meshpipe.generation.scorer import Scorer
from meshpipe.generation.scoring import Score
from meshpipe.generation.staged_weights import ReadWeights, StagedWeights, given
from meshpipe.generation.tokenizer import TextTokenizer, decode_after, encode_pair, first_token
from meshpipe.layers.task import Task
from meshpipe.mesh import DATA, make_mesh
from meshpipe.models.model import ModelConfig
from meshpipe.processes.agreement import agree, report_failure
from meshpipe.processes.group import Group
from meshpipe.sharding import ShardingRules

LEAST_LENGTH = 32
"""The fewest positions that caches have."""
DtypeName = Literal["float32", "bfloat16"]
DTYPES = get_args(DtypeName)
ShouldStop = Callable[[int], bool]


class Generator:
    """A language model that continues texts: one stage for each rank of the mesh, and no optimizer.

    Texts run in groups of `batch_size` rows, of which `in_flight` run at a time, so that every rank has work: while one
    group is at the last rank, others are at those before it. The row of a text that has ended is given to the next
    prompt at once. What is generated does not depend on layout, groups or other prompts, but for rounding. Every
    process of the mesh must make the same calls.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, Any] | ReadWeights,
        *,
        mesh: Mesh | None = None,
        tokenizer: TextTokenizer | None = None,
        ends: Sequence[int] | None = None,
        lora: LoraConfig | None = None,
        batch_size: int = 8,
        in_flight: int | None = None,
        rules: ShardingRules | None = None,
        weights_dtype: str = "float32",
        compile_cache: str | None = None,
    ) -> None:
        """Places the weights on the devices. Nothing is compiled before the first prompt.

        Arguments:
            model: The configuration of the model, whose attention is `meshpipe.models.transformer.Attention` and whose
                last layer puts out logits `[batch, seq, vocab]`.
            weights: Arrays by leaf path, as `meshpipe.load` returns them and `Trainer.params` has them; or a function
                that reads them onto the submeshes.
            mesh: The devices; by default one.
            tokenizer: Turns text into tokens; without it, only `tokens` and `stream` can be used.
            ends: The tokens that end a text where no `SamplingConfig` says so; None is the end token of `tokenizer`.
            lora: The adapters of the model, if it has any.
            batch_size: The most texts of a group.
            in_flight: How many groups run at a time; by default as many as there are ranks.
            rules: Which mesh axis splits which axis of a parameter; by default those of `Trainer`.
            weights_dtype: In which kernels and embeddings are kept. A model that computes in bfloat16 gives the same
                tokens with bfloat16, in half the memory.
            compile_cache: A folder that keeps compiled programs for later; None keeps none.

        Raises `ValueError` when model, weights and mesh do not fit together.
        """
        check_whole("batch_size", batch_size)
        self.mesh = make_mesh() if mesh is None else mesh
        self.model, self.tokenizer = model, tokenizer
        self.ends = _ends(ends, tokenizer)
        self._in_flight = self.mesh.devices.shape[0] if in_flight is None else in_flight
        check_whole("in_flight", self._in_flight)
        self._batch_size = batch_size
        self._group = Group(device.process_index for device in self.mesh.devices.flat)
        self._rules = ShardingRules() if rules is None else rules
        self._cache = open_cache(compile_cache)
        self._decoders: dict[tuple[int, int], Decoder] = {}
        self._calls = itertools.count()
        if weights_dtype not in DTYPES:
            raise ArgumentError(f"`weights_dtype` must be one of {', '.join(DTYPES)}. Got {weights_dtype!r}.")
        if not self._group.is_alone:
            said = {"mesh": dict(self.mesh.shape), "batch size": batch_size, "groups in flight": self._in_flight}
            said |= {"adapters": lora, "dtype of weights": weights_dtype}
            agree(self._group, "generator", {name: str(value) for name, value in said.items()})
        read = given(weights) if isinstance(weights, Mapping) else weights
        kept = None if weights_dtype == "float32" else weights_dtype
        task = _task(model, LoraConfig() if lora is None else lora, self._rules, self.mesh.shape.get(DATA, 1))
        self._weights = StagedWeights.of(task, self.mesh, read, dtype=kept)

    def generate(self, prompts: str | Sequence[str], sampling: SamplingConfig | None = None, **fields: Any) -> Any:
        """The texts that follow the prompts: of one prompt a string, of several a list of them, in their order.

        Arguments:
            prompts: A text, or several.
            sampling: How text is continued.
            **fields: Fields of `SamplingConfig`, in place of those of `sampling`: `generate(text, max_tokens=50)`.

        Raises `ValueError` without a tokenizer, and as `tokens` does.
        """
        tokenizer = self._tokenizer()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [tokenizer.encode(text) for text in texts]
        found = self.tokens(encoded, self._sampling(sampling, fields))
        written = [decode_after(tokenizer, prompt, ids) for prompt, ids in zip(encoded, found, strict=True)]
        return written[0] if isinstance(prompts, str) else written

    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        stop_when: StopWhen | None = None,
        **fields: Any,
    ) -> list[list[int]]:
        """The tokens that follow each prompt; arguments and errors as those of `stream`."""
        found: list[list[int]] = [[] for _ in prompts]
        for drawn in self.stream(prompts, sampling, stop_when=stop_when, **fields):
            found[drawn.request].append(drawn.token)
        return found

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        stop_when: StopWhen | None = None,
        on_end: Callable[[int], object] | None = None,
        should_stop: ShouldStop | None = None,
        **fields: Any,
    ) -> Iterator[Drawn]:
        """Every token as soon as it is known, with the number of its prompt.

        Arguments:
            prompts: The tokens of each prompt, at least one.
            sampling: How text is continued; a field of `fields` takes precedence.
            stop_when: Called after each token with the tokens that were added to a text; it ends the text by True.
                Every process must answer alike.
            on_end: Called with the number of each text once all its tokens are known.
            should_stop: Called after each turn, in which every group begins texts or gets a token for each of them,
                with the number of the turn. Once it returns True, nothing more is generated. Every process must stop
                after the same turn.
            **fields: Fields of `SamplingConfig`.

        Raises `ValueError` for a prompt without tokens, tokens that the model does not have, a text that is longer than
        the model allows, and texts whose caches do not fit into memory; the iterator, for prompts whose activations do
        not.
        """
        chosen = sampling = self._sampling(sampling, fields) if fields or sampling is None else sampling
        requests = [
            Request(number=n, prompt=tokens_of(prompt, n), sampling=chosen, stop_when=stop_when, on_end=on_end)
            for n, prompt in enumerate(prompts)
        ]
        topic = f"prompts {next(self._calls)}"
        with report_failure(self._group, topic):
            self._check(requests, sampling)
            decoder = self._decoder_of(requests, sampling) if requests else None
        if not self._group.is_alone:
            asked = {"prompts": str([request.prompt for request in requests]), "sampling": str(sampling)}
            agree(self._group, topic, asked)
        return iter(()) if decoder is None else self._run(decoder, requests, should_stop)

    @cached_property
    def scorer(self) -> Scorer:
        """Says how likely given texts are, with the same weights on the same devices. Raises `ArgumentError` for a
        model whose last layer is called in a way of its own.
        """
        return Scorer(
            model=self.model,
            layers=self._weights.layers,
            staged=self._weights,
            cache=self._cache,
            group=self._group,
            batch_size=self._batch_size,
            in_flight=self._in_flight,
        )

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """How likely each text is after its context: pairs of a context and a continuation. An empty context is the
        token that begins texts, or else the one that ends them.

        Raises `ValueError` without a tokenizer, and as `first_token` and `Scorer.tokens` do.
        """
        tokenizer = self._tokenizer()
        tokens = [
            encode_pair(tokenizer, context, text)
            if context
            else ([first_token(tokenizer)], tokenizer.encode(text, special=False))
            for context, text in pairs
        ]
        return self.scorer.tokens(tokens)

    def caches(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> Caches:
        """The caches that `stream` allocates for prompts, at least one. Raises `ArgumentError` when they do not fit."""
        requests = [Request(number=n, prompt=prompt, sampling=sampling) for n, prompt in enumerate(prompts)]
        decoder = self._decoder_of(requests, sampling)
        return Caches(whole=decoder.whole, few=decoder.few, groups=self._groups(len(prompts)))

    def _groups(self, texts: int) -> int:
        """How many groups of so many texts run at a time."""
        return min(self._in_flight, texts)

    def _run(self, decoder: Decoder, requests: Sequence[Request], should_stop: ShouldStop | None) -> Iterator[Drawn]:
        first = decoder.batch * self._in_flight
        # What begins together is about equally long; what follows comes in turn.
        waiting = deque([*sorted(requests[:first], key=lambda request: len(request.prompt)), *requests[first:]])
        groups = [RunningGroup.of(decoder) for _ in range(self._groups(len(requests)))]
        for turn in itertools.count():
            for group in groups:
                group.advance(waiting)
                yield from group.read()
            if not waiting and all(group.has_ended for group in groups):
                return
            if should_stop is not None and should_stop(turn):
                return

    def _decoder_of(self, requests: Sequence[Request], sampling: SamplingConfig) -> Decoder:
        """What continues texts like these. Raises `ArgumentError` when their caches do not fit into memory."""
        parts = self.mesh.shape.get(DATA, 1)
        longest = max(len(request.prompt) for request in requests)
        batch = -(-min(self._batch_size, -(-len(requests) // self._in_flight)) // parts) * parts
        length = power_of_two(longest + sampling.max_tokens - 1, LEAST_LENGTH)
        if (batch, length) not in self._decoders:
            whole = self._caching_model(batch, length)
            few = whole if batch == parts else self._caching_model(parts, length)
            groups = self._groups(len(requests))
            texts = f"{groups * batch} texts" if groups * batch > 1 else "a text"
            asked = f"{texts} of up to {longest} + {sampling.max_tokens} tokens (prompt and `max_tokens`)"
            Caches(whole=whole, few=few, groups=groups).check(asked)
            self._decoders[batch, length] = Decoder(whole=whole, few=few)
        return self._decoders[batch, length]

    def _caching_model(self, batch: int, length: int) -> CachingModel:
        return CachingModel.of(
            self._weights.layers,
            input=self.model.input,
            batch=batch,
            length=length,
            mesh=self.mesh,
            cuts=self._weights.model.cuts,
            rules=self._rules,
            weights=self._weights.values,
            group=self._group,
            cache=self._cache,
            at_once=self._in_flight,
        )

    def _check(self, requests: Sequence[Request], sampling: SamplingConfig) -> None:
        check_stop_tokens(self.model, sampling.stop_tokens)
        most: int | None = getattr(self.model, "max_positions", None)
        for request in requests:
            if not request.prompt:
                raise ArgumentError(
                    f"A prompt must have at least one token. Got none in prompt {request.number}. Begin the text."
                )
            check_tokens(self.model, request.prompt, f"prompt {request.number}")
            length = len(request.prompt) + sampling.max_tokens
            if most is not None and length > most:
                raise ArgumentError(
                    f"A text must fit into the {most} positions of the model. Got a prompt of {len(request.prompt)} "
                    f"tokens and `max_tokens` {sampling.max_tokens}. Shorten one of them."
                )

    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ArgumentError("Text needs a tokenizer. Got none: pass `tokenizer`, or use `tokens` with token ids.")
        return self.tokenizer

    def _sampling(self, sampling: SamplingConfig | None, fields: Mapping[str, Any]) -> SamplingConfig:
        """The config with other fields; without a config, `ends` end a text."""
        if sampling is None:
            sampling = SamplingConfig(stop_tokens=self.ends)
        if not isinstance(sampling, SamplingConfig):
            raise ArgumentError(f"`sampling` must be a SamplingConfig. Got {kind_of(sampling)}.")
        return replace(sampling, **fields)


def _ends(given: Any, tokenizer: TextTokenizer | None) -> tuple[int, ...]:
    if given is None:
        end = None if tokenizer is None else tokenizer.end
        return () if end is None else (end,)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ArgumentError(f"`ends` must be a tuple of tokens. Got {kind_of(given)}.")
    return tuple(given)


def _task(model: ModelConfig, lora: LoraConfig, rules: ShardingRules, rows: int) -> Task:
    shape = jax.ShapeDtypeStruct((rows, LEAST_BEGINNING), jnp.int32)
    return Task(
        with_lora(model.layers(), lora),
        model.loss,
        batch={model.input: shape, POSITIONS: shape},
        input=model.input,
        tied=model.tied(),
        rules=rules,
    )
