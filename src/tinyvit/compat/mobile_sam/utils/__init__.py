"""MobileSAM's ``utils``."""
