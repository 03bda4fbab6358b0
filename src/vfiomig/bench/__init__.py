"""What `vfiomig bench` does: measure save and load, beside tools that only copy."""
