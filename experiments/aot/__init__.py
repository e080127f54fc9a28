# SPDX-License-Identifier: Apache-2.0
"""Compiling for TPUs and GPUs that are only described: memory, collectives, what kernels take. See `__main__`."""
