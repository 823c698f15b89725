from __future__ import annotations

import os

from hypothesis import settings

# The same examples in every run, so that a failure is there again tomorrow; no deadline, because
# the first call of a torch operator on a busy machine takes longer than any bound that means
# something. `HYPOTHESIS_PROFILE=explore` draws new examples.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
