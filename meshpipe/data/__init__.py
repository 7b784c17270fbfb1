"""Sources of examples, and batches from them."""

# Every name is imported at its first use: to prepare data needs no JAX.
from typing import TYPE_CHECKING

from meshpipe.lazy import importing

if TYPE_CHECKING:
    from meshpipe.data.batch import Batch as Batch
    from meshpipe.data.batch import BatchIterator as BatchIterator
    from meshpipe.data.batch import DataConfig as DataConfig
    from meshpipe.data.batch import Source as Source
    from meshpipe.data.batch import batches as batches
    from meshpipe.data.batch import example_batch as example_batch
    from meshpipe.data.digits import Digits as Digits
    from meshpipe.data.digits import DigitsConfig as DigitsConfig
    from meshpipe.data.prepared import MixedWindows as MixedWindows
    from meshpipe.data.prepared import PreparedConfig as PreparedConfig
    from meshpipe.data.prepared import PreparedWindows as PreparedWindows
    from meshpipe.data.reversed_text import ReversedTextConfig as ReversedTextConfig
    from meshpipe.data.reversed_text import ReversedWindows as ReversedWindows
    from meshpipe.data.source import check_limits as check_limits
    from meshpipe.data.source import check_source as check_source
    from meshpipe.data.text import LabelledWindows as LabelledWindows
    from meshpipe.data.text import PackageWindowsConfig as PackageWindowsConfig
    from meshpipe.data.text import PackedWindows as PackedWindows
    from meshpipe.data.text import TextFilesConfig as TextFilesConfig
    from meshpipe.data.tokenizer import Tokenizer as Tokenizer

_MODULES = {
    "Batch": "meshpipe.data.batch",
    "BatchIterator": "meshpipe.data.batch",
    "DataConfig": "meshpipe.data.batch",
    "Source": "meshpipe.data.batch",
    "batches": "meshpipe.data.batch",
    "example_batch": "meshpipe.data.batch",
    "Digits": "meshpipe.data.digits",
    "DigitsConfig": "meshpipe.data.digits",
    "MixedWindows": "meshpipe.data.prepared",
    "PreparedConfig": "meshpipe.data.prepared",
    "PreparedWindows": "meshpipe.data.prepared",
    "ReversedTextConfig": "meshpipe.data.reversed_text",
    "ReversedWindows": "meshpipe.data.reversed_text",
    "check_limits": "meshpipe.data.source",
    "check_source": "meshpipe.data.source",
    "LabelledWindows": "meshpipe.data.text",
    "PackageWindowsConfig": "meshpipe.data.text",
    "PackedWindows": "meshpipe.data.text",
    "TextFilesConfig": "meshpipe.data.text",
    "Tokenizer": "meshpipe.data.tokenizer",
}
"""By name, the module that has it."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = importing(globals(), _MODULES)
