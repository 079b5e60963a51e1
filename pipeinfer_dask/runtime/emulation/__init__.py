"""Real pipelines with emulated models, or with emulated distance."""
