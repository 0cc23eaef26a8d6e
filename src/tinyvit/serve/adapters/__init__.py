"""Foreign protocols in front of the same service: each translates, and adds no state of its own."""
