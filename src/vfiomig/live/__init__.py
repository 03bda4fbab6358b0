"""Live migration between two hosts: docs/session-protocol.md, in code."""
