"""What a worker holds: a stage or a drafter, with its thread and its links."""
