# SPDX-License-Identifier: Apache-2.0
"""Everything that runs: training, evaluation, data, checkpoints, sharding, benchmarks, studies and their tables."""
