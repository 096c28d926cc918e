"""Multiplication by packed weights: layouts, CUDA and CPU kernels, and the choice among them."""
