"""What holds for every test: no network, one torch thread, no deadlines for Hypothesis.

`HYPOTHESIS_PROFILE=ci` (set by `.ci/run`) is Hypothesis' own profile of that name: the same
examples in every run, and no example database.
"""

import os

from hypothesis import settings

# Read by huggingface_hub when it is imported, in this process and in all that it starts.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read by torch. The tests' models are tiny: a second thread would only wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("local", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "local"))
