"""How the next token of a text is chosen."""

from dataclasses import dataclass

from meshpipe.errors import ArgumentError, check_seed, check_whole, is_number, kind_of

LENGTH_LIMIT = 2**24
"""The number of tokens must be below this."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose each next token; by default the most likely one."""

    max_tokens: int = 64
    """Tokens to add to a prompt, at most."""
    temperature: float = 0.0
    """Logits are divided by it before a token is drawn. 0 takes the most likely token."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens whose probabilities add up to at least this; 1 draws from all."""
    seed: int = 0
    """Seed of the draws. They depend on it, on the number of the prompt and on the position, not on the layout."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a text; they are not part of it."""

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, below=LENGTH_LIMIT)
        check_whole("top_k", self.top_k, 0, LENGTH_LIMIT)
        check_seed(self.seed)
        if not is_number(self.temperature):
            raise ArgumentError(f"`temperature` must be a finite number of at least 0. Got {self.temperature}.")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ArgumentError(f"`top_p` must be above 0 and at most 1. Got {self.top_p}. 1 leaves no token out.")
        if not isinstance(self.stop_tokens, tuple | list):
            raise ArgumentError(f"`stop_tokens` must be a tuple of tokens. Got {kind_of(self.stop_tokens)}.")
        for token in self.stop_tokens:
            check_whole("stop_tokens", token, 0)
