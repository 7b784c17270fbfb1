"""The dtypes of tensors that are exported."""

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES_BY_NAME: Mapping[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
