"""Fused ops, floor 0. Each file reads in the same order: maths, reference, Triton kernels, autograd, public op."""
