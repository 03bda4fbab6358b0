"""Simulated devices: docs/simulator.md, in code. device.py answers what a kernel's device does."""
