"""How a device's bytes are framed in a stream: headers in and out, no I/O, no payload."""
