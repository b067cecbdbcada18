"""Called when hypothesis is imported: strategies for the types of flexattn, where flexattn has been imported before."""

from __future__ import annotations

import sys


def register() -> None:
    """Register strategies for `st.from_type`, unless flexattn is not in use; it then registers them in `flexattn.testing`."""
    if "flexattn" in sys.modules:
        from flexattn.testing import registration

        registration.register()
