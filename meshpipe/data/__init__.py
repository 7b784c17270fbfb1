"""Sources of examples, and batches from them."""

from meshpipe.data.batches import Batch as Batch
from meshpipe.data.batches import BatchIterator as BatchIterator
from meshpipe.data.batches import DataConfig as DataConfig
from meshpipe.data.batches import Source as Source
from meshpipe.data.batches import batches as batches
from meshpipe.data.batches import example_batch as example_batch
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
