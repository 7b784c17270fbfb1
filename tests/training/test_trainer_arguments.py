"""Every argument of a trainer is documented where it is given."""

import inspect
import re

from meshpipe import Trainer


def test_the_constructor_documents_its_arguments_in_order() -> None:
    documented = re.findall(r"^ *- `(\w+)`: ", Trainer.__init__.__doc__ or "", re.MULTILINE)
    assert documented == [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
