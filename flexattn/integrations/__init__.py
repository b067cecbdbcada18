"""Ways to use this library from models that were written for another one. Import the one you want by its name."""
