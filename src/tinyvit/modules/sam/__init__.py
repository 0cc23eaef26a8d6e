"""Networks of Segment Anything: prompt encoder, mask decoders, two-way transformer."""
