"""`errors`, under the name by which scripts of IPython Parallel import it: `from ipyparallel.error import CompositeError`."""

from __future__ import annotations

import sys

from . import errors

sys.modules[__name__] = errors
