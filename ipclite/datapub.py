"""`publish_data`, where scripts of IPython Parallel import it from."""

from __future__ import annotations

from .functions import publish_data as publish_data
