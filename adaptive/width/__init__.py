# SPDX-License-Identifier: Apache-2.0
"""How much of a layer runs for a token."""
