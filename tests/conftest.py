"""What holds for every test: no network, and Hypothesis without deadlines.

`HYPOTHESIS_PROFILE=ci` (set by `.ci/run`) is Hypothesis' own profile of that name: the same
examples in every run, and no example database.
"""

import os

from hypothesis import settings

# Read by huggingface_hub when it is imported, in this process and in all that it starts.
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("local", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "local"))
