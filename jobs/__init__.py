"""The top floor: each job parses its arguments, builds what it needs, runs it and returns an exit code."""
