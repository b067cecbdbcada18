"""The compiler: a Python callable in, a program, its graphs and its derivative out."""
