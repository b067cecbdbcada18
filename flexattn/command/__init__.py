"""The command line: `flexattn`, or `python -m flexattn`."""
