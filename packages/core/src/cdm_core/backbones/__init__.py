"""Networks that more than one plugin builds on, under the names of their released weights.

They are built from the fused operators of `cdm_kernels`: a plugin that uses one depends on cdm-kernels.
"""
