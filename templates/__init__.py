"""Triton kernels: ordinary `@triton.jit` files that take generated functions as compile-time arguments."""
