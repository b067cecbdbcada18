"""The ways to compute a variant: block by block with torch operators, or densely as the definition of what is correct."""
