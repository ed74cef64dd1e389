"""Latency on a device: files to time there, the timing program, the table fitted to what it wrote, a check."""
