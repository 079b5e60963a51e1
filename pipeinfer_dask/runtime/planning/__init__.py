"""What is asked for, and who is to hold what: checked before anything is allocated."""
