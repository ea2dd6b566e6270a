"""NVIDIA GPUs since Ampere: Triton kernels beside cuDNN and cuBLAS, one CUDA graph a size."""
