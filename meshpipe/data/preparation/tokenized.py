"""Documents as tokens, with those that mark their begin and end."""

from collections.abc import Sequence

import numpy as np

from meshpipe.data.packing import Segment
from meshpipe.data.preparation.documents import Document
from meshpipe.data.tokenizer import Encoded, Tokenizer


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, end: int | None) -> list[Segment]:
    """The tokens of each document: in front what the tokenizer puts there, behind them `end`, if there is one. What a
    document does not begin or end has neither.
    """
    found: dict[int, Encoded] = {}
    for special in (False, True):
        alike = [i for i, document in enumerate(documents) if (document.special and document.begins) == special]
        plain = [i for i in alike if documents[i].answers is None]
        found |= {
            i: (tokens, None)
            for i, tokens in zip(
                plain, tokenizer.encode_all([documents[i].text for i in plain], special=special), strict=True
            )
        }
        partly = [i for i in alike if documents[i].answers is not None]
        texts, spans = [documents[i].text for i in partly], [documents[i].answers or () for i in partly]
        found |= dict(zip(partly, tokenizer.encode_spans(texts, spans, special=special), strict=True))
    return [_ended(document, *found[i], end) for i, document in enumerate(documents)]


def _ended(document: Document, tokens: np.ndarray, learned: np.ndarray | None, end: int | None) -> Segment:
    if not document.special or end is None:
        return Segment(tokens, learned)
    has_end = tokens.size > 0 and tokens[-1] == end  # some tokenizers add it themselves
    if document.ends and not has_end:
        tokens = np.append(tokens, np.int32(end))
        learned = None if learned is None else np.append(learned, True)
    elif document.ends and learned is not None:
        learned[-1] = True
    elif not document.ends and has_end and document.begins:
        tokens, learned = tokens[:-1], None if learned is None else learned[:-1]
    return Segment(tokens, learned)
