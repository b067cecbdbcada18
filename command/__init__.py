"""The command line: `flexattn`, or `python -m flexattn`.

It is a package of its own because an import of anything inside `flexattn` is one of torch, which takes seconds: help and
mistakes in the arguments need none.
"""
