# SPDX-License-Identifier: Apache-2.0
"""Compiling for TPUs that are only described: memory, collectives and kernel schedules without a TPU. See `__main__`."""
