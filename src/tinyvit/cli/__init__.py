"""The command line: ``main`` has the parser, every verb has a file of its own.

Nothing is computed here: a verb reads its arguments, calls the library, and writes what came back.
Data goes to stdout; talk, warnings and progress go to stderr. torch, numpy and Pillow are imported
inside the verbs, so that ``tinyvit --help`` answers at once.
"""
