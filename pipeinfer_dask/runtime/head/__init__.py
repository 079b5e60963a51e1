"""Who drives a pipeline, and what callers hold of it: generations and conversations."""
