"""Whether data was prepared with the tokenizer that a model was trained with."""

import json
from pathlib import Path
from typing import Any

from meshpipe.data.batch import DataConfig
from meshpipe.data.manifest import TOKENIZER_FOLDER
from meshpipe.data.prepared import PreparedConfig
from meshpipe.data.tokenizer import FILE

_SAID = 3
"""Tokens that a sentence names."""


def other_tokenizer(data: DataConfig, model: Path) -> str:
    """A sentence about prepared data whose tokenizer gives other tokens than that in the folder of a model; empty where
    they are alike, or one of them is not known.
    """
    if not isinstance(data, PreparedConfig):
        return ""
    folder = Path(
        data.path if data.path is not None else data.mixture[0][0]
    ).expanduser()  # a mixture has one tokenizer
    files = folder / TOKENIZER_FOLDER / FILE, model / FILE
    try:
        texts = [file.read_bytes() for file in files]
        vocabularies = [] if texts[0] == texts[1] else [_vocabulary(json.loads(text)) for text in texts]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return ""  # who reads them for their tokens says what is wrong
    if not vocabularies or vocabularies[0] == vocabularies[1]:
        return ""
    ours, theirs = vocabularies
    differ = [token for token in ours if ours[token] != theirs.get(token)]
    differ += [token for token in theirs if token not in ours]
    named = ", ".join(f"{token!r} is {_number(ours, token)}, not {_number(theirs, token)}" for token in differ[:_SAID])
    return (
        f"The tokens of {folder} are not those of the tokenizer in {model}, with {len(differ):,} differences: {named}. "
        "Unless that is meant, prepare the data with that tokenizer."
    )


def _number(vocabulary: dict[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "none"


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """The number of each token in a tokenizer.json, whatever kind of model it has."""
    found = tokenizer["model"]["vocab"]
    tokens = dict(found) if isinstance(found, dict) else {piece: number for number, (piece, _) in enumerate(found)}
    return tokens | {added["content"]: added["id"] for added in tokenizer.get("added_tokens") or ()}
