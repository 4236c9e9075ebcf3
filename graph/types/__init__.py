"""Object types, inputs and payloads, one file per noun."""
