"""Called when hypothesis is imported: strategies for the types of flexattn, where flexattn has been imported before.

Where it has not, this costs half a millisecond, and `import flexattn.testing` registers them later. Where it has, it also
imports `flexattn.testing`; the strategies themselves are imported when hypothesis asks for the first one.
"""

from __future__ import annotations

import sys


def register() -> None:
    """Register strategies for `st.from_type`, unless flexattn is not in use; it then registers them in `flexattn.testing`."""
    if "flexattn" in sys.modules:
        from flexattn.testing import registration

        registration.register()
