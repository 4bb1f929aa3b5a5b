"""Examples with other programs around them: each is driven by something real."""
