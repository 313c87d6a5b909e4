"""Settings of all tests: how many examples Hypothesis draws where a test does not say."""

import os

from hypothesis import settings

settings.register_profile("default run", max_examples=30)
settings.register_profile("thorough", max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default run"))
