"""The GPU benchmark: sections, each in a separate process; their checks; their measurements."""
