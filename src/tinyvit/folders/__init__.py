"""Work on folders of images, without a command line: list, read ahead, compute, write, report."""
