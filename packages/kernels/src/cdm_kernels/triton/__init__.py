"""The Triton kernels, one module an operator, with the functions of `cdm_kernels.cpp`."""
