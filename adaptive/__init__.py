# SPDX-License-Identifier: Apache-2.0
"""Methods of adaptive compute as pure functions on arrays and pytrees; one folder for each thing that adapts."""
