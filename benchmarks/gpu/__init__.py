"""The GPU benchmark: sections, each in a process of its own; what they check; what they measure."""
